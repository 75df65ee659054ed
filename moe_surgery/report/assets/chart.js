// Line charts, drawn for the available width so that text keeps its size on a phone.
const COLOURS = 8;
// More lines are hard to tell apart.
const FEW = 8;
const DASHES = ["", "7 3", "2 2.5", "9 3 2 3"];
const MARKERS = [
  "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0z", "M-3.2 -3.2h6.4v6.4h-6.4z", "M0 -4.2L4 3H-4z",
  "M0 -4.6L4.2 0L0 4.6L-4.2 0z", "M-3 -3L3 3M3 -3L-3 3", "M0 -4V4M-4 0H4", "M0 4.2L4 -3H-4z",
];
const styleOf = (index) => ({
  colour: "s" + (index % COLOURS),
  dash: DASHES[(index + Math.floor(index / COLOURS)) % DASHES.length] || null,
  marker: MARKERS[index % MARKERS.length],
});

function markerAt(index, x, y, title) {
  const s = styleOf(index);
  const e = draw("path", { class: "mark " + s.colour, d: s.marker, transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` });
  if (title) e.append(draw("title", null, typeof title === "function" ? title() : title));
  return e;
}

function legend(lines) {
  return make("ul", { class: "legend" }, ...lines.map((l) => {
    const s = styleOf(l.index);
    const sample = draw("svg", { width: 34, height: 16, viewBox: "0 0 34 16", "aria-hidden": "true" },
      draw("path", { class: "line " + s.colour, d: "M1 8H33", "stroke-dasharray": s.dash }), markerAt(l.index, 17, 8));
    return make("li", null, sample, " ", l.name);
  }));
}

function ticks(low, high, log) {
  if (!(high > low)) return [low];
  const found = [];
  if (log) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    for (let d = first; d <= last; d++)
      for (const s of last - first < 4 ? [1, 2, 5] : [1]) {
        const t = Number((s * 10 ** d).toPrecision(6));
        if (t >= low && t <= high * 1.0001) found.push(t);
      }
    return found;
  }
  const raw = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 2.5, 5, 10].map((s) => s * unit).find((s) => s >= raw * 0.999);
  for (let i = Math.ceil(low / size - 1e-9); i <= Math.floor(high / size + 1e-9); i++) found.push(Number((i * size).toPrecision(10)));
  return found;
}

// Counts of experts are powers of two: about eight of them, on multiples of one.
function wholeTicks(low, high) {
  let size = 1;
  while ((high - low) / size > 9) size *= 2;
  const found = [];
  for (let x = Math.ceil(low / size) * size; x <= high; x += size) found.push(x);
  return found;
}

// c: {title, xLabel, yLabel, x: [from, to], y: [from, to], log, percent, level: {name, y}, at, marks,
// series: [{name, index, muted, points: [{x, y, low, high, title: text or function}]}]}
function lineChart(c, width) {
  const height = Math.round(Math.min(320, Math.max(230, width * 0.6)));
  const top = 12, right = 16, bottom = 44, left = 56;
  const atX = (x) => left + (width - left - right) * (x - c.x[0]) / (c.x[1] - c.x[0] || 1);
  const atY = (y) => {
    const [low, high] = c.y;
    const share = c.log ? (Math.log(Math.max(y, low)) - Math.log(low)) / (Math.log(high) - Math.log(low) || 1)
      : (y - low) / (high - low || 1);
    return height - bottom - (height - top - bottom) * Math.min(Math.max(share, 0), 1);
  };
  const pair = (x, y) => atX(x).toFixed(1) + " " + atY(y).toFixed(1);
  const svg = draw("svg", { class: "chart", role: "img", "aria-label": c.title + ": " + c.yLabel + " against " + c.xLabel,
    width, height, viewBox: `0 0 ${width} ${height}` });
  for (const y of ticks(c.y[0], c.y[1], c.log)) {
    svg.append(draw("path", { class: "grid", d: `M${left} ${atY(y).toFixed(1)}H${width - right}` }));
    svg.append(draw("text", { x: left - 8, y: (atY(y) + 4).toFixed(1), "text-anchor": "end" },
      c.percent ? Number((100 * y).toPrecision(4)) + " %" : String(y)));
  }
  for (const x of wholeTicks(c.x[0], c.x[1]))
    svg.append(draw("text", { x: atX(x).toFixed(1), y: height - bottom + 18, "text-anchor": "middle" }, String(x)));
  svg.append(draw("text", { class: "axis", x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, c.xLabel));
  if (c.level) {
    const y = atY(c.level.y).toFixed(1);
    svg.append(draw("path", { class: "level", d: `M${left} ${y}H${width - right}` }));
    svg.append(draw("text", { class: "halo", x: left + 6, y: Number(y) - 6 }, c.level.name));
  }
  if (c.at) svg.append(draw("path", { class: "at", d: `M${atX(c.at).toFixed(1)} ${top}V${height - bottom}` }));
  for (const s of c.series) {
    const style = styleOf(s.index);
    if (s.points.some((p) => p.high > p.low)) {
      const band = [...s.points.map((p) => pair(p.x, p.high)), ...s.points.map((p) => pair(p.x, p.low)).reverse()];
      svg.append(draw("path", { class: "band " + style.colour, d: "M" + band.join("L") + "z" }));
    }
    if (s.points.length > 1) {
      const thin = Math.max(1, Math.floor(s.points.length / 128));  // not more points than the eye can see
      svg.append(draw("path", { class: "line " + (s.muted ? "muted" : style.colour), "stroke-dasharray": s.muted ? null : style.dash,
        d: "M" + s.points.filter((_, i) => i % thin === 0 || i === s.points.length - 1).map((p) => pair(p.x, p.y)).join("L") }));
    }
    if (s.muted) continue;
    const every = Math.max(1, Math.floor(s.points.length / 8));
    s.points.forEach((p, i) => {
      if (i % every === s.index % every) svg.append(markerAt(s.index, atX(p.x), atY(p.y), p.title));
    });
  }
  let above = 0;  // keeps the names of nearby plans apart
  for (const m of [...(c.marks || [])].sort((a, b) => b.y - a.y)) {
    above = Math.max(atY(m.y) + 16, above + 14);
    svg.append(draw("path", { class: "plan", d: `M${pair(m.x, m.y)}m0 -6l6 6l-6 6l-6 -6z` }));
    const early = atX(m.x) < width * 0.6;
    svg.append(draw("text", { class: "halo", x: atX(m.x) + (early ? 10 : -10), y: above.toFixed(1),
      "text-anchor": early ? "start" : "end" }, m.name.length > 28 ? m.name.slice(0, 27) + "\u2026" : m.name));
  }
  return svg;
}

let printing = false;

// Charts side by side if two fit.
function showPanels(id, charts) {
  const box = byId(id);
  const available = printing ? 700 : box.clientWidth || 640;
  const width = printing ? (charts.length > 1 ? 340 : 690) : Math.floor(available >= 870 && charts.length > 1 ? (available - 28) / 2 : available);
  box.replaceChildren(...charts.map((c) => make("div", { class: "panel" }, make("h3", null, c.title, ", ", make("span", { class: "unit" }, c.yLabel)), lineChart(c, width))));
}
