// Draw everything once; redraw on resize what depends on the width.
document.querySelectorAll(".controls").forEach((c) => { c.hidden = false; });
startMap();
if (byId("overlap")) {
  onChange(["overlap-metric", "overlap-n"], showOverlap);
  showOverlap();
}
onChange(["coverage-compare", "coverage-view", "coverage-metric", "coverage-kind", "coverage-n"], showCoverage);
showCoverage();
if (D.evaluations.length) startEvaluation();
startExperts();

let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  showCoverage();
  if (D.evaluations.length) showEvaluation();
});

// In print everything is expanded, tables too unless they are very long.
const PRINTED_ROWS = 1600;
const opened = [];
let shortened = [];

function drawForPrint(on) {
  printing = on;
  showCoverage();
  if (D.evaluations.length) showEvaluation();
  showExperts();
}

addEventListener("beforeprint", () => {
  document.querySelectorAll("details:not([open])").forEach((d) => { d.open = true; opened.push(d); });
  shortened = [models, ...(D.layers * D.experts <= PRINTED_ROWS ? [experts] : [])].filter((t) => !t.all);
  shortened.forEach((t) => { t.all = true; });
  drawForPrint(true);
});
addEventListener("afterprint", () => {
  while (opened.length) opened.pop().open = false;
  shortened.forEach((t) => { t.all = false; });
  drawForPrint(false);
});
