// One token: what the models predict after it, and its path through the layers.
let picked = 0;
// Of the picked token: what models predict, the figure and the table of its path. Each is redrawn only if it changes.
const parts = { head: make("div"), figure: make("div", { class: "path-figure" }), table: make("table", { class: "plain path-table", id: "path" }) };
const drawn = { figure: "", table: "" };
byId("token").append(parts.head, make("h3", null, "Path through the layers"), parts.figure, parts.table);

function pickToken(t, scroll) {
  const before = picked;
  picked = Math.min(Math.max(t, 0), T - 1);
  spans[before].removeAttribute("aria-selected");
  spans[picked].setAttribute("aria-selected", "true");
  write(before, before + 1);
  write(picked, picked + 1);
  byId("text").setAttribute("aria-activedescendant", "t" + picked);
  if (scroll) spans[picked].scrollIntoView({ block: "nearest", behavior: "instant" });
  markStrip();
  showToken();
}

function showToken() {
  const lines = [make("p", { class: "name" }, make("b", null, D.texts[picked]), ` token ${picked}, id ${D.ids[picked]}`)];
  const head = ["Model", "Predicts next", "Loss", ...(compared ? ["KL"] : [])];
  const rows = D.models.map((m) => make("tr", null, make("th", { scope: "row" }, m.name),
    make("td", null, make("code", null, D.words[m.predicted[picked]]), ` ${percent(m.probability[picked], 0)}`),
    make("td", null, picked < m.loss.length ? figure(m.loss[picked]) : "\u2013"),
    ...(compared ? [make("td", null, m.kept ? figure(m.kl[picked]) : "\u2013")] : [])));
  lines.push(make("table", { class: "plain numbers predictions" },
    make("thead", null, make("tr", null, ...head.map((h) => make("th", { scope: "col" }, h)))), make("tbody", null, ...rows)));
  if (picked + 1 < D.texts.length)
    lines.push(make("p", { class: "hint" }, "In the text follows ", make("code", null, D.texts[picked + 1]), "."));
  parts.head.replaceChildren(...lines);
  byId("readout").textContent = readout();
  const path = `${picked} ${plan()}`, size = `${path} ${printing} ${innerWidth}`;
  if (drawn.figure !== size) parts.figure.replaceChildren(pathKey(), pathFigure());
  drawn.figure = size;
  if (drawn.table === path) return markLayer();
  byId("token").setAttribute("aria-busy", "true");
  if (printing) showTable(); else afterFrame("table", showTable);
}

function readout() {
  const l = layer(), list = chosenIn(D.models[run()], l, picked).map((x) => `${x.expert} (${whole100(x.weight)} %)`);
  const value = mode() === EXPERT ? "" : ` Shown: ${painted.labels[picked]}${mode() === KL ? " nats" : " %"}.`;
  return `Token ${picked} \u201c${D.texts[picked]}\u201d, layer ${l}: experts ${list.join(", ")}.${value}`;
}

// What a token does in a layer, with the picked plan: full model's experts, and those that replace the lost ones.
function inLayer(l) {
  const p = plan(), kept = p ? D.models[p].kept : null;
  const ours = chosenIn(D.models[full], l, picked).map((x) => ({ ...x, lost: kept !== null && !kept[l * E + x.expert] }));
  const before = new Set(ours.map((x) => x.expert));
  const after = p ? chosenIn(D.models[p], l, picked).map((x) => ({ ...x, fresh: !before.has(x.expert) })) : [];
  return { ours, after };
}

function pathKey() {
  const sign = (c, d) => draw("svg", { width: 14, height: 14, viewBox: "-7 -7 14 14", "aria-hidden": "true" }, draw("path", { class: c, d }));
  const items = [[CIRCLE(4), "at", "chosen, larger with more weight"]];
  if (compared) items.push([CIRCLE(4), "lost", "removed by the plan"], [CROSS(4), "fresh", "chosen only with the plan"]);
  return make("ul", { class: "legend small" }, ...items.map(([d, c, words]) => make("li", null, sign(c, d), words)));
}

const CIRCLE = (r, x, y) => `M${(x || 0) - r} ${y || 0}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`;
const CROSS = (r, x, y) => `M${(x || 0) - r} ${y || 0}h${2 * r}M${x || 0} ${(y || 0) - r}v${2 * r}`;

// Experts across, layers down; a line joins the strongest of each layer.
function pathFigure() {
  const width = Math.max(220, Math.min((printing ? 340 : byId("token").clientWidth || 360) - 32, 520));
  const row = L <= 8 ? 24 : L <= 16 ? 16 : L <= 32 ? 12 : L <= 64 ? 8 : 6, left = 26, top = 18, right = 10;
  const x = (e) => left + 8 + (E > 1 ? (e * (width - left - right - 8)) / (E - 1) : 0), y = (l) => top + (l + 0.5) * row;
  const marked = { at: "", lost: "", fresh: "" };
  let line = "";
  for (let l = 0; l < L; l++) {
    const { ours, after } = inLayer(l);
    line += `${l ? "L" : "M"}${x(ours[0].expert).toFixed(1)} ${y(l)}`;
    for (const o of ours) marked[o.lost ? "lost" : "at"] += CIRCLE(1 + 0.5 * row * Math.sqrt(o.weight), Number(x(o.expert).toFixed(1)), y(l));
    for (const a of after) if (a.fresh) marked.fresh += CROSS(0.6 + 0.4 * row * Math.sqrt(a.weight), Number(x(a.expert).toFixed(1)), y(l));
  }
  const every = L <= 8 ? 1 : L <= 32 ? 4 : 8, marks = wholeMarks(E, 4), height = top + L * row + 4;
  return draw("svg", { class: "path", role: "img", width, height, viewBox: `0 0 ${width} ${height}`,
    "aria-label": `Experts of token ${picked} by layer; the table below has the numbers` },
    ...marks.map((e) => draw("text", { x: x(e), y: 10, "text-anchor": "middle" }, String(e))),
    ...marks.map((e) => draw("path", { class: "grid", d: `M${x(e)} ${top}V${height}` })),
    ...Array.from({ length: Math.ceil(L / every) }, (_, i) => draw("text", { x: left - 4, y: y(i * every) + 4, "text-anchor": "end" }, String(i * every))),
    draw("path", { class: "way", d: line }), ...Object.entries(marked).map(([c, d]) => draw("path", { class: c, d })));
}

// About `n` expert numbers from 0 on, multiples of a power of two.
function wholeMarks(count, n) {
  let size = 1;
  while (count / size > n) size *= 2;
  return Array.from({ length: Math.ceil(count / size) }, (_, i) => i * size);
}

// After the rest: it is long, and a key held down need not draw it for every token.
function showTable() {
  // For the mouse; keys have the lists of layers and experts.
  const chip = (l, x) => make("span", { "data-at": l + "," + x.expert,
    class: "chip q" + step(x.weight) + (x.lost ? " lost" : "") + (x.fresh ? " fresh" : "") },
    make(x.lost ? "s" : "b", null, String(x.expert)), " " + whole100(x.weight));
  const rows = [];
  for (let l = 0; l < L; l++) {
    const { ours, after } = inLayer(l);
    rows.push(make("tr", null, make("th", { scope: "row" }, String(l)), make("td", null, ...ours.map((x) => chip(l, x))),
      ...(compared ? [make("td", null, ...after.map((x) => chip(l, x)))] : [])));
  }
  const head = ["Layer", "Experts, weight in percent", ...(compared ? ["With " + D.models[plan()].name] : [])];
  parts.table.replaceChildren(
    make("thead", null, make("tr", null, ...head.map((h) => make("th", { scope: "col" }, h)))), make("tbody", null, ...rows));
  drawn.table = `${picked} ${plan()}`;
  byId("token").removeAttribute("aria-busy");
  markLayer();
}

function markLayer() {
  const rows = parts.table.tBodies.length ? parts.table.tBodies[0].rows : [];
  for (let l = 0; l < rows.length; l++) rows[l].classList.toggle("here", l === layer());
}
