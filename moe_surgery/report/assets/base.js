// The page's data, and helpers for all figures. Names come from untrusted files: they enter the page as
// text only, never as markup.
const D = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

function make(name, attributes, ...content) {
  const e = document.createElement(name);
  for (const [k, v] of Object.entries(attributes || {})) if (v !== null && v !== undefined) e.setAttribute(k, v);
  e.append(...content);
  return e;
}

function draw(name, attributes, ...content) {
  const e = document.createElementNS(SVG, name);
  for (const [k, v] of Object.entries(attributes || {})) if (v !== null && v !== undefined) e.setAttribute(k, v);
  e.append(...content);
  return e;
}

// Four significant digits, with thousands separators.
function figure(v) {
  if (v === null || v === undefined || Number.isNaN(v)) return "\u2013";
  const size = Math.abs(v);
  if (size !== 0 && (size >= 1e7 || size < 1e-3)) return v.toExponential(2).replace("e+", "e");
  return size === 0 ? "0" : size >= 1000 ? Math.round(v).toLocaleString("en") : v.toPrecision(4);
}

// A count, or a mean of counts.
const whole = (v) => (Number.isInteger(v) ? v.toLocaleString("en") : figure(v));
const score = (metric, v) => (D.metrics[metric] === "frequency" && D.counts ? whole(v) : figure(v));

const percent = (v, digits) => (v === null ? "\u2013" : (100 * v).toFixed(digits === undefined ? 1 : digits) + " %");
const STEPS = 24;
const step = (share) => Math.round(Math.min(Math.max(share, 0), 1) * (STEPS - 1));
const chosen = (id) => (byId(id) ? Number(byId(id).value) : 0);

function onChange(ids, act) {
  for (const id of ids) if (byId(id)) byId(id).addEventListener("input", act);
}

function fillChoice(id, names) {
  const before = byId(id).value;
  byId(id).replaceChildren(...names.map((n, i) => make("option", { value: i }, n)));
  if (Number(before) < names.length) byId(id).value = before;
}

function choice(id, label, names) {
  const select = make("select", { id });
  const field = make("label", null, make("span", null, label), select);
  select.append(...names.map((n, i) => make("option", { value: i }, n)));
  return field;
}
