// Draw everything once; redraw on resize what depends on the width.
document.querySelectorAll(".controls").forEach((c) => { c.hidden = false; });
startMap();
if (D.views.length > 1) startOverlap();
if (D.kinds.length) {
  onChange(["coverage-compare", "coverage-view", "coverage-metric", "coverage-kind", "coverage-n"], showCoverage);
  showCoverage();
}
if (D.evaluations.length) startEvaluation();
startExperts();
unpackAhead(() => {
  if (D.views.length > 1) firstOverlap();
  document.body.dataset.unpacked = "";
});

// What depends on the width.
function redraw() {
  layMap();
  if (D.views.length > 1) showLayers();
  if (D.kinds.length) showCoverage();
  if (D.evaluations.length) showEvaluation();
}

let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintMap);

// In print everything is expanded, tables too unless they are very long.
const opened = [];
let shortened = [];

function drawForPrint(on) {
  printing = on;
  paintMap();
  redraw();
  if (D.views.length > 1) showOverlap();
  showExperts();
}

addEventListener("beforeprint", () => {
  document.querySelectorAll("details:not([open])").forEach((d) => { d.open = true; opened.push(d); });
  shortened = [models, experts, shared].filter((t) => !t.all);
  shortened.forEach((t) => { t.all = true; });
  drawForPrint(true);
});
addEventListener("afterprint", () => {
  while (opened.length) opened.pop().open = false;
  shortened.forEach((t) => { t.all = false; });
  drawForPrint(false);
});
