// The heat map: a grid of focusable cells, one of which is in the page's tab order at a time.
const map = { svg: byId("map"), cells: [], cursor: null, layer: 0, expert: 0, focused: false };

function keptSets(plan) {
  const p = D.plans[plan];
  return p ? p.kept.map((row) => new Set(row)) : null;
}

const cellOf = (layer, expert) => map.cells[layer][expert];
const planShown = () => (byId("map-plan") ? chosen("map-plan") : -1);

function startMap() {
  map.svg.setAttribute("role", "grid");
  map.svg.setAttribute("aria-rowcount", D.layers);
  map.svg.setAttribute("aria-colcount", D.experts);
  map.cursor = map.svg.querySelector(".cursor");
  map.cursor.setAttribute("role", "presentation");
  map.svg.querySelectorAll("text").forEach((t) => t.setAttribute("aria-hidden", "true"));
  map.svg.querySelectorAll("g").forEach((row, layer) => {
    row.setAttribute("role", "row");
    map.cells.push([...row.children]);
    map.cells[layer].forEach((cell, expert) => {
      cell.setAttribute("role", "gridcell");
      cell.setAttribute("tabindex", layer || expert ? "-1" : "0");
      cell.dataset.at = layer + "," + expert;
    });
  });
  byId("map-readout").hidden = false;
  map.svg.addEventListener("keydown", moveInMap);
  const at = (event) => (event.target.dataset && event.target.dataset.at ? event.target.dataset.at.split(",").map(Number) : null);
  map.svg.addEventListener("pointerover", (event) => at(event) && showReadout(...at(event)));
  map.svg.addEventListener("pointerleave", () => map.focused ? showReadout(map.layer, map.expert) : hideCursor());
  map.svg.addEventListener("pointerdown", (event) => at(event) && focusCell(...at(event)));
  // On the box: listening for focus would make the drawing itself a stop of the Tab key.
  map.svg.parentElement.addEventListener("focusin", (event) => {
    if (!at(event)) return;
    map.focused = true;
    rove(...at(event));
    showReadout(map.layer, map.expert);
  });
  map.svg.parentElement.addEventListener("focusout", () => { map.focused = false; hideCursor(); });
  onChange(["map-view", "map-metric", "map-plan", "map-scale"], paintMap);
  paintMap();
}

const hideCursor = () => map.cursor.setAttribute("visibility", "hidden");

function rove(layer, expert) {
  cellOf(map.layer, map.expert).setAttribute("tabindex", "-1");
  map.layer = layer;
  map.expert = expert;
  cellOf(layer, expert).setAttribute("tabindex", "0");
}

function focusCell(layer, expert) {
  rove(layer, expert);
  cellOf(layer, expert).focus({ preventScroll: true });
  const scroll = map.svg.parentElement, cell = cellOf(layer, expert).getBoundingClientRect(), box = scroll.getBoundingClientRect();
  if (cell.left < box.left + 44) scroll.scrollLeft -= box.left + 44 - cell.left;
  if (cell.right > box.right - 8) scroll.scrollLeft += cell.right - box.right + 8;
  if (cell.top < 0 || cell.bottom > innerHeight) cellOf(layer, expert).scrollIntoView({ block: "nearest" });
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

// The numbers of one cell under the map.
function showReadout(layer, expert) {
  const cell = cellOf(layer, expert), view = chosen("map-view"), metric = chosen("map-metric");
  map.cursor.setAttribute("x", cell.x.baseVal.value - 1);
  map.cursor.setAttribute("y", cell.y.baseVal.value - 1);
  map.cursor.setAttribute("visibility", "visible");
  const i = layer * D.experts + expert, kept = keptSets(planShown());
  const state = kept ? (kept[layer].has(expert) ? ", kept by " : ", not kept by ") + D.plans[planShown()].name : "";
  const list = make("dl", null, ...D.metrics.map((m, k) => make("div", k === metric ? { class: "chosen" } : null,
    make("dt", null, m), make("dd", null, score(k, D.scores[k][view][i]) + " (" + ordinal(D.ranks[k][view][i]) + ")"))));
  byId("map-readout").replaceChildren(
    make("p", null, make("b", null, `Layer ${layer}, expert ${expert}`), ` on ${D.views[view].name}${state}`), list);
}

function ordinal(n) {
  const tens = n % 100;
  return n + (tens >= 11 && tens <= 13 ? "th" : ["th", "st", "nd", "rd"][n % 10] || "th");
}

function paintMap() {
  const view = chosen("map-view"), metric = chosen("map-metric"), plan = planShown();
  const scores = D.scores[metric][view], ranks = D.ranks[metric][view], kept = keptSets(plan), name = D.metrics[metric];
  const all = chosen("map-scale") === 1;
  const top = all ? Math.max(...scores) : 0;
  const dots = [];
  map.cells.forEach((row, layer) => {
    const from = layer * D.experts;
    const most = all ? top : Math.max(...scores.slice(from, from + D.experts));
    row.forEach((cell, expert) => {
      const value = scores[from + expert], stays = kept && kept[layer].has(expert);
      cell.setAttribute("class", "q" + step(most > 0 ? value / most : 0));
      cell.setAttribute("aria-label", `layer ${layer}, expert ${expert}: ${name} ${score(metric, value)}, ` +
        `${ordinal(ranks[from + expert])} of ${D.experts}` + (kept ? (stays ? ", kept" : ", not kept") : ""));
      if (stays) dots.push(`M${cell.x.baseVal.value + cell.width.baseVal.value / 2} ${cell.y.baseVal.value + cell.height.baseVal.value / 2}h0`);
    });
  });
  map.svg.querySelectorAll(".rim, .dot").forEach((p) => p.setAttribute("d", dots.join("")));
  map.svg.setAttribute("aria-label", `Heat map: ${name} of ${D.experts} experts in ${D.layers} layers, ${D.views[view].name}`);
  byId("scale-high").textContent = all ? score(metric, top) : "largest of the layer";
  if (byId("map-key")) byId("map-key").hidden = !kept;
  byId("orders").tBodies[0].replaceChildren(...map.cells.map((_, layer) => {
    const order = new Array(D.experts);
    for (let e = 0; e < D.experts; e++) order[ranks[layer * D.experts + e] - 1] = e;
    return make("tr", null, make("th", { scope: "row" }, String(layer)), make("td", null, order.join(" ")));
  }));
  if (map.focused) showReadout(map.layer, map.expert);
  else byId("map-readout").replaceChildren(make("p", null, "Hover over a cell, or focus the map and use the arrow keys."));
}
