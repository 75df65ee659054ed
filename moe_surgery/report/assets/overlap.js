// How much the best experts of domains overlap: all pairs, layer by layer, and the experts that domains share.
function popcount(v) {
  v -= (v >>> 1) & 0x55555555;
  v = (v & 0x33333333) + ((v >>> 2) & 0x33333333);
  return (((v + (v >>> 4)) & 0x0f0f0f0f) * 0x01010101) >>> 24;
}

// The n best experts of every layer in one view, a bit for each.
function bestOf(metric, view, n) {
  const orders = ordersOf(metric, view), set = new Uint32Array(Math.ceil(CELLS / 32));
  for (let layer = 0; layer < D.layers; layer++)
    for (let k = 0; k < n; k++) {
      const i = layer * D.experts + orders[layer * D.listed + k];
      set[i >> 5] |= 1 << (i & 31);
    }
  return set;
}

function inCommon(a, b) {
  let count = 0;
  for (let i = 0; i < a.length; i++) count += popcount(a[i] & b[i]);
  return count;
}

const has = (set, i) => (set[i >> 5] >>> (i & 31)) & 1;
const topics = () => D.views.map((_, v) => v).filter((v) => !D.views[v].all);

function startOverlap() {
  if (D.views.length > 2 && D.views[0].all) byId("overlap-a").value = 1;
  byId("overlap-b").value = chosen("overlap-a") + 1;
  onChange(["overlap-metric", "overlap-n"], showOverlap);
  onChange(["overlap-a", "overlap-b"], showLayers);
  onChange(["shared-least"], showShared);
}

// After the ranks are unpacked; until then the page has the first table of overlaps.
function firstOverlap() {
  const { counts } = overlapNow();
  if (byId("shared-least")) byId("shared-least").value = Math.max(2, counts.reduce((a, b) => Math.max(a, b)));
  showOverlap();
}

// For the chosen metric and number n: the best of each view, and of how many domains each expert is among the best.
let overlapKept = null;

function overlapNow() {
  const metric = chosen("overlap-metric"), n = chosen("overlap-n"), key = metric + " " + n;
  if (!overlapKept || overlapKept.key !== key) {
    const counts = new Uint8Array(CELLS);
    for (const v of topics()) {
      const orders = ordersOf(metric, v);
      for (let layer = 0; layer < D.layers; layer++)
        for (let k = 0; k < n; k++) counts[layer * D.experts + orders[layer * D.listed + k]]++;
    }
    overlapKept = { key, metric, n, counts, sets: D.views.map((_, v) => bestOf(metric, v, n)) };
  }
  return overlapKept;
}

function showOverlap() {
  const { metric, n, sets } = overlapNow(), rows = [...byId("overlap").tBodies[0].rows];
  byId("overlap-n-value").textContent = n;
  rows.forEach((row, a) => {
    for (let b = 0; b <= a; b++) {
      const share = inCommon(sets[a], sets[b]) / (n * D.layers), words = (100 * share).toFixed(0);
      for (const cell of [row.cells[b + 1], rows[b].cells[a + 1]]) {
        if (cell.textContent !== words) cell.firstChild.data = words;
        if (cell.className !== "q" + step(share)) cell.className = "q" + step(share);
      }
    }
  });
  byId("overlap-caption").textContent = `Percent. The best ${n} of ${D.experts} experts` +
    (D.measured ? ` by ${D.metrics[metric]}` : "") + `; random choice would give ${((100 * n) / D.experts).toFixed(0)}.`;
  showLayers();
  showShared();
}

function showLayers() {
  const { metric, n, sets, counts } = overlapNow(), a = chosen("overlap-a"), b = chosen("overlap-b"), many = topics().length;
  const pair = new Array(D.layers).fill(0), mean = new Array(D.layers).fill(0), orders = ordersOf(metric, a);
  for (let layer = 0; layer < D.layers; layer++) {
    for (let k = 0; k < n; k++) pair[layer] += has(sets[b], layer * D.experts + orders[layer * D.listed + k]);
    for (let i = layer * D.experts; i < (layer + 1) * D.experts; i++) mean[layer] += counts[i] * (counts[i] - 1);
    mean[layer] /= many * (many - 1);
  }
  const line = (name, index, values) => ({ name, index, points: values.map((v, x) => (
    { x, y: v / n, title: () => `${name}, layer ${x}: ${percent(v / n, 0)}` })) });
  const lines = [line(`${D.views[a].name} and ${D.views[b].name}`, 0, pair)];
  if (many > 2) lines.push(line("mean over all pairs", 1, mean));
  showPanels("overlap-layers", [{
    title: `Best ${n} experts in common`, xLabel: "layer", yLabel: "share of the layer's best", percent: true,
    x: [0, D.layers - 1], y: [0, 1], series: lines, level: { name: "random choice", y: n / D.experts },
  }]);
  byId("overlap-legend").replaceChildren(legend(lines));
}

const shared = { by: null, down: false, all: false, rows: 24 };
const MOST_NAMED = 12;

const beyond = (experts) => (experts.length > MOST_NAMED ? ` and ${experts.length - MOST_NAMED} more` : "");

function showShared() {
  const { n, sets, counts } = overlapNow(), many = topics().length, what = D.measured ? "domain" : "ranking";
  const least = byId("shared-least") ? chosen("shared-least") : many, or = least < many ? `${least} or more` : `all ${many}`;
  if (byId("shared-least")) byId("shared-least-value").textContent = or;
  const rows = Array.from({ length: D.layers }, (_, layer) => {
    const row = { layer, all: [], one: [], none: 0 };
    for (let e = 0; e < D.experts; e++) {
      const i = layer * D.experts + e;
      if (counts[i] >= least) row.all.push(e);
      else if (counts[i] === 1) row.one.push(e);
      else if (!counts[i]) row.none++;
    }
    return row;
  });
  const owner = (layer, e) => D.views[topics().find((v) => has(sets[v], layer * D.experts + e))].name;
  // By the domain that has them: "law: 3 17; math: 5".
  const grouped = (row) => {
    const groups = new Map();
    for (const e of row.one.slice(0, MOST_NAMED)) groups.set(owner(row.layer, e), [...(groups.get(owner(row.layer, e)) || []), e]);
    return [...groups].map(([name, experts]) => `${name}: ${experts.join(" ")}`).join("; ") + beyond(row.one);
  };
  const total = (key) => rows.reduce((sum, row) => sum + (row[key].length ?? row[key]), 0).toLocaleString("en");
  byId("shared-caption").textContent = `Of ${CELLS.toLocaleString("en")} experts, ${total("all")} are among their layer's best ${n} in ` +
    `${or} ${what}s, ${total("one")} in one ${what} only, ${total("none")} in none.`;
  const count = (name, value) => ({ name, value, show: (r) => String(value(r)), position: true });
  sortable(byId("shared"), [
    count("Layer", (r) => r.layer), count(`In ${or}`, (r) => r.all.length), count("In one", (r) => r.one.length),
    count("In none", (r) => r.none),
    { name: `Experts in ${or}`, words: true, value: (r) => r.all.length, show: (r) => r.all.slice(0, MOST_NAMED).join(" ") + beyond(r.all) },
    { name: "Experts in one", words: true, value: (r) => r.one.length, show: grouped },
  ], rows, shared);
}
