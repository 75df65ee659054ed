// The text, coloured: a class, a height and a label per token. The tokens in view are written first, the others
// in pieces afterwards, so that a choice shows at once however long the text is.
const [EXPERT, KL, LOST, AGREEMENT] = [0, 1, 2, 3];
const STYLED = 8;  // experts with a separate colour
const spans = [...byId("text").querySelectorAll("span")];
const PIECE = 400;
const painted = { written: spans.map((s) => s.className), classes: [], heights: [], labels: [], values: null };
const compared = D.models.length > 1;
const mode = () => (compared ? chosen("mode") : EXPERT);
const plan = () => (compared ? chosen("plan") + 1 : full);
const run = () => (compared ? chosen("run") : full);
const layer = () => chosen("layer");
const expert = () => Number(byId("expert").value);
const overLayer = () => (chosen("span") === 0 ? -1 : layer());
const whole100 = (v) => (v > 0 && v < 0.005 ? "<1" : (100 * v).toFixed(0));

// Experts of the layer by number, with how many tokens choose them; "strongest of each token" is -1.
function fillExperts() {
  const before = byId("expert").value, { chosenBy } = usesIn(run(), layer());
  const listed = [make("option", { value: -1 }, "strongest of each token")];
  chosenBy.forEach((n, e) => { if (n || String(e) === before) listed.push(make("option", { value: e }, `${e} (${n} tokens)`)); });
  byId("expert").replaceChildren(...listed);
  byId("expert").value = !listed.some((o) => o.value === before) ? "-1" : before;
}

function showControls() {
  const now = mode(), one = chosen("span") === 1;
  const shown = { plan: compared, run: now === EXPERT, a: now === AGREEMENT, b: now === AGREEMENT,
    span: now >= LOST, layer: now === EXPERT || (now >= LOST && one), expert: now === EXPERT };
  for (const [id, on] of Object.entries(shown)) if (byId(id)) byId(id).closest("label").hidden = !on;
}

// {classes, heights, labels, values}, and the key: {items} of experts or {label, low, high} of a scale.
function coloured() {
  const now = mode();
  if (now === EXPERT && expert() < 0) return byStrongest();
  if (now === EXPERT) {
    const values = weightsOf(run(), layer(), expert());
    const fires = values.reduce((n, v) => n + (v >= 0), 0), top = Math.max(...values, 1e-9);
    return scaled(values, top, (v) => v / top, whole100,
      { label: `Layer ${layer()}, expert ${expert()} fires for ${fires} of ${T} tokens; routing weight`, low: "0", high: percent(top, 0) });
  }
  if (now === KL) {
    const values = Float32Array.from(D.models[plan()].kl), top = Math.max(...values);
    return scaled(values, top, (v) => (top > 0 ? Math.sqrt(v / top) : 0), (v) => (v ? v.toPrecision(2) : "0"),
      { label: `KL with ${D.models[plan()].name}, nats (square-root scale)`, low: "0", high: top.toPrecision(3) });
  }
  const where = overLayer() < 0 ? "mean of all layers" : "layer " + layer();
  if (now === LOST)
    return scaled(weightLost(plan(), overLayer()), 1, (v) => v, whole100,
      { label: `Routing weight on experts that ${D.models[plan()].name} removes, ${where}`, low: "0 %", high: "100 %" });
  const [a, b] = [chosen("a"), chosen("b")];
  return scaled(agreement(a, b, overLayer()), 1, (v) => v, whole100,
    { label: `Experts in common, ${D.models[a].name} and ${D.models[b].name}, ${where}`, low: "0 %", high: "100 %" });
}

// Values below 0 have no colour.
function scaled(values, top, share, label, key) {
  const classes = [], heights = [], labels = [];
  for (let t = 0; t < T; t++) {
    const v = values[t], none = v < 0;
    classes.push(none ? "" : "q" + step(share(v)));
    heights.push(none ? 0 : Math.max(share(v), 0.04));
    labels.push(none ? "" : label(v));
  }
  return { classes, heights, labels, values, key };
}

function byStrongest() {
  const model = D.models[run()], l = layer(), { strongest } = usesIn(run(), l);
  const order = [...strongest.keys()].filter((e) => strongest[e]).sort((x, y) => strongest[y] - strongest[x] || x - y);
  const styles = new Map(order.slice(0, STYLED).map((e, i) => [e, i]));
  const classes = [], labels = [];
  for (let t = 0; t < T; t++) {
    const e = strongestIn(model, l, t), i = styles.get(e);
    classes.push(i === undefined ? "" : "e s" + i);
    labels.push(String(e));
  }
  const items = [...styles].map(([e, i]) => ({ expert: e, style: i, count: strongest[e] }));
  const rest = order.slice(STYLED).reduce((n, e) => n + strongest[e], 0);
  return { classes, heights: classes.map((c) => (c ? 1 : 0)), labels, values: null, key: { items, rest } };
}

function paint() {
  showControls();
  const next = coloured();
  const { classes, heights, labels, values } = next;
  Object.assign(painted, { classes, heights, labels, values });
  const [from, to] = inView();
  write(from, to);
  showKey(next.key);
  drawStrip();
  byId("text").setAttribute("aria-busy", "true");
  const rest = (t) => {
    write(t, t + PIECE);
    if (t + PIECE < T) afterFrame("text", () => rest(t + PIECE));
    else byId("text").removeAttribute("aria-busy");
  };
  afterFrame("text", () => rest(0));
}

// Do `act` once what is there so far has been shown; a later call of the same name replaces it.
const pending = {};
function afterFrame(name, act) {
  const call = pending[name] = {};
  requestAnimationFrame(() => setTimeout(() => { if (pending[name] === call) act(); }, 0));
}

function write(from, to) {
  const numbers = byId("numbers").checked;
  for (let t = Math.max(0, from); t < Math.min(T, to); t++) {
    const name = painted.classes[t] + (t >= D.promptTokens ? " made" : "") + (t === picked ? " on" : "") + (numbers ? " n" : "");
    if (name !== painted.written[t]) spans[t].className = painted.written[t] = name;
    if (numbers && spans[t].dataset.n !== painted.labels[t]) spans[t].dataset.n = painted.labels[t];
  }
}

// The tokens in the box's view, first and last, and a line on each side.
function inView() {
  const box = byId("text"), low = box.scrollTop - 60, high = box.scrollTop + box.clientHeight + 60;
  const top = box.offsetTop;
  const firstBelow = (y) => {
    let a = 0, b = T;
    while (a < b) {
      const middle = (a + b) >> 1;
      if (spans[middle].offsetTop - top < y) a = middle + 1; else b = middle;
    }
    return a;
  };
  return [firstBelow(low), firstBelow(high)];
}

function showKey(key) {
  byId("scale").hidden = !key.label;
  byId("experts").hidden = !key.items;
  if (key.label) for (const part of ["label", "low", "high"]) byId("scale-" + part).textContent = key[part];
  if (!key.items) return;
  const items = key.items.map((x) => {
    const button = make("button", { type: "button", class: "plain-button" }, make("i", { class: "e s" + x.style }), `expert ${x.expert} (${x.count})`);
    button.addEventListener("click", () => pickExpert(layer(), x.expert));
    return make("li", null, button);
  });
  if (key.rest) items.push(make("li", null, `others (${key.rest})`));
  byId("experts").replaceChildren(...items);
}

// The whole text in one line, a bar per token; as many paths as there are colours.
function drawStrip() {
  const paths = new Map();
  painted.classes.forEach((c, t) => {
    if (!painted.heights[t]) return;
    const h = (40 * painted.heights[t]).toFixed(1);
    paths.set(c, (paths.get(c) || "") + `M${t} 40v-${h}h1v${h}z`);
  });
  const svg = draw("svg", { viewBox: `0 0 ${T} 40`, preserveAspectRatio: "none", width: "100%", height: 40, "aria-hidden": "true" },
    ...[...paths].map(([c, d]) => draw("path", { class: c, d })),
    draw("path", { class: "here", "vector-effect": "non-scaling-stroke" }));
  byId("strip").replaceChildren(svg);
  markStrip();
}

function markStrip() {
  const here = byId("strip").querySelector(".here");
  if (here) here.setAttribute("d", `M${picked + 0.5} 0V40`);
}

function pickExpert(l, e) {
  if (compared) byId("mode").value = EXPERT;
  byId("layer").value = l;
  fillExperts();
  if (![...byId("expert").options].some((o) => o.value === String(e))) byId("expert").append(make("option", { value: e }, `${e} (0 tokens)`));
  byId("expert").value = e;
  paint();
  showToken();
}
