// The heat map: one stop of the Tab key, in which the arrow keys move from cell to cell.
const map = { surface: null, layer: 0, expert: 0, focused: false };
const MAP_HINT = "Hover over a cell, or focus the map and use the arrow keys.";
const planShown = () => (byId("map-plan") ? chosen("map-plan") : -1);

function startMap() {
  const drawing = byId("map");
  map.surface = drawing.localName === "svg" ? svgSurface(drawing) : canvasSurface(drawing);
  const { element } = map.surface, at = (event) => map.surface.at(event);
  byId("map-readout").hidden = false;
  element.addEventListener("keydown", moveInMap);
  element.addEventListener("pointermove", (event) => at(event) && showReadout(...at(event)));
  element.addEventListener("pointerover", (event) => at(event) && showReadout(...at(event)));
  element.addEventListener("pointerleave", () => map.focused ? showReadout(map.layer, map.expert) : map.surface.hide());
  element.addEventListener("pointerdown", (event) => at(event) && focusCell(...at(event)));
  // On the box: listening for focus would make the drawing itself a stop of the Tab key.
  drawing.parentElement.addEventListener("focusin", (event) => {
    if (event.target !== element && !at(event)) return;
    map.focused = true;
    if (event.target !== element) rove(...at(event));
    showReadout(map.layer, map.expert);
  });
  drawing.parentElement.addEventListener("focusout", () => { map.focused = false; map.surface.hide(); });
  onChange(["map-view", "map-metric", "map-plan", "map-scale"], paintMap);
  onChange(["map-zoom"], layMap);
  byId("lists").addEventListener("toggle", listOrders);
  map.surface.lay();
  paintMap();
}

// After the page's width or the size of cells has changed.
function layMap() {
  map.surface.lay();
  if (map.focused) map.surface.place(map.layer, map.expert);
}

function rove(layer, expert) {
  map.layer = layer;
  map.expert = expert;
  map.surface.rove(layer, expert);
}

function focusCell(layer, expert) {
  rove(layer, expert);
  map.surface.focus(layer, expert);
  showReadout(layer, expert);
}

function moveInMap(event) {
  let { layer, expert } = map;
  const page = Math.max(1, Math.ceil(D.layers / 4));
  switch (event.key) {
    case "ArrowRight": expert++; break;
    case "ArrowLeft": expert--; break;
    case "ArrowDown": layer++; break;
    case "ArrowUp": layer--; break;
    case "PageDown": layer += page; break;
    case "PageUp": layer -= page; break;
    case "Home": expert = 0; if (event.ctrlKey) layer = 0; break;
    case "End": expert = D.experts - 1; if (event.ctrlKey) layer = D.layers - 1; break;
    default: return;
  }
  event.preventDefault();
  focusCell(Math.min(Math.max(layer, 0), D.layers - 1), Math.min(Math.max(expert, 0), D.experts - 1));
}

function ordinal(n) {
  const tens = n % 100;
  return n + (tens >= 11 && tens <= 13 ? "th" : ["th", "st", "nd", "rd"][n % 10] || "th");
}

const placed = (rank) => (rank ? ordinal(rank) : "after " + ordinal(D.listed));

// Score and rank of cell i, as far as they are known.
function scored(metric, view, i) {
  const rank = placed(ranksOf(metric, view)[i]);
  return D.measured ? `${score(metric, scoresOf(metric, view)[i])} (${rank})` : rank;
}

// The numbers of one cell under the map.
function showReadout(layer, expert) {
  const view = chosen("map-view"), metric = chosen("map-metric"), i = layer * D.experts + expert;
  map.surface.place(layer, expert);
  const kept = keptIn(planShown());
  const state = kept ? (kept[i] ? ", kept by " : ", not kept by ") + D.plans[planShown()].name : "";
  const values = D.measured
    ? D.metrics.map((m, k) => [m, scored(k, view, i), k === metric])
    : D.views.map((v, k) => [v.name, scored(0, k, i), k === view]);
  const list = make("dl", null, ...values.map(([name, value, now]) => make("div", now ? { class: "chosen" } : null,
    make("dt", null, name), make("dd", null, value))));
  byId("map-readout").replaceChildren(
    make("p", null, make("b", null, `Layer ${layer}, expert ${expert}`), ` on ${D.views[view].name}${state}`), list);
}

function paintMap() {
  const view = chosen("map-view"), metric = chosen("map-metric"), name = D.metrics[metric];
  const scores = scoresOf(metric, view), ranks = ranksOf(metric, view), kept = keptIn(planShown());
  const all = chosen("map-scale") === 1;
  const largest = new Float64Array(D.layers);
  for (let i = 0; i < CELLS; i++) {
    const layer = Math.floor(i / D.experts);
    if (scores[i] > largest[layer]) largest[layer] = scores[i];
  }
  const top = largest.reduce((a, b) => Math.max(a, b), 0);
  const shades = new Uint8Array(CELLS);
  for (let i = 0; i < CELLS; i++) {
    const most = all ? top : largest[Math.floor(i / D.experts)];
    shades[i] = step(most > 0 && scores[i] > 0 ? scores[i] / most : 0);
  }
  map.surface.paint({
    shades,
    kept,
    label: `Heat map: ${name} of ${D.experts} experts in ${D.layers} layers, ${D.views[view].name}`,
    describe: (i) => `layer ${Math.floor(i / D.experts)}, expert ${i % D.experts}: ${name} ` +
      (D.measured ? score(metric, scores[i]) + ", " : "") + `${placed(ranks[i])} of ${D.experts}` +
      (kept ? (kept[i] ? ", kept" : ", not kept") : ""),
  });
  if (D.measured) byId("scale-high").textContent = all ? score(metric, top) : "largest of the layer";
  if (byId("map-key")) byId("map-key").hidden = !kept;
  listOrders();
  if (map.focused) showReadout(map.layer, map.expert);
  else byId("map-readout").replaceChildren(make("p", null, MAP_HINT));
}

// The experts of each layer, best first, under the map.
function listOrders() {
  if (CELLS > 5000 && !byId("lists").open) return;
  const orders = ordersOf(chosen("map-metric"), chosen("map-view"));
  const count = printing && CELLS > 5000 ? Math.min(32, D.listed) : D.listed;  // not dozens of sheets of paper
  const { tBodies, tHead } = byId("orders");
  tHead.rows[0].cells[1].textContent = "Experts, best first" + (count < D.experts ? ` (the first ${count})` : "");
  tBodies[0].replaceChildren(...Array.from({ length: D.layers }, (_, layer) =>
    make("tr", null, make("th", { scope: "row" }, String(layer)),
      make("td", null, orders.subarray(layer * D.listed, layer * D.listed + count).join(" ")))));
}
