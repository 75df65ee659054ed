// Unpack, then enable the controls. Without DecompressionStream (browsers before 2023) the first view stays.
let printing = false;

// The token nearest to x in the next line above or below.
function inNextLine(t, down) {
  const box = (i) => spans[i].getClientRects()[0] || spans[i].getBoundingClientRect();
  const from = box(t), x = from.left;
  let best = t, line = null;
  for (let i = t + (down ? 1 : -1); i >= 0 && i < T; i += down ? 1 : -1) {
    const b = box(i);
    if (Math.abs(b.top - from.top) < 4) continue;
    if (line === null) line = b.top;
    if (Math.abs(b.top - line) >= 4) break;
    if (best === t || Math.abs(b.left - x) < Math.abs(box(best).left - x)) best = i;
  }
  return best;
}

// The next token (or the one before) with a value; of the same strongest expert where experts are shown.
function nextMarked(by) {
  const marked = (t) => (painted.values ? painted.values[t] > 0 : painted.labels[t] === painted.labels[picked]);
  for (let t = picked + by; t >= 0 && t < T; t += by) if (marked(t)) return t;
  return picked;
}

function moveInText(event) {
  if (event.ctrlKey && event.key !== "Home" && event.key !== "End") return;
  if (event.altKey || event.metaKey) return;
  const to = {
    ArrowRight: () => picked + 1, ArrowLeft: () => picked - 1,
    ArrowDown: () => inNextLine(picked, true), ArrowUp: () => inNextLine(picked, false),
    PageDown: () => picked + 50, PageUp: () => picked - 50, Home: () => 0, End: () => T - 1,
    n: () => nextMarked(1), p: () => nextMarked(-1),
  }[event.key];
  if (!to) return;
  event.preventDefault();
  pickToken(to(), true);
}

function fromHash() {
  const at = /^#t(\d+)$/.exec(location.hash);
  if (at && Number(at[1]) < T) pickToken(Number(at[1]), true);
}

function listen() {
  byId("text").addEventListener("keydown", moveInText);
  byId("text").addEventListener("click", (event) => {
    const span = event.target.closest("[role=option]");
    if (span) pickToken(Number(span.id.slice(1)));
  });
  byId("strip").addEventListener("click", (event) => {
    const box = byId("strip").getBoundingClientRect();
    pickToken(Math.floor((T * (event.clientX - box.left)) / box.width), true);
  });
  byId("token").addEventListener("click", (event) => {
    const chip = event.target.closest("[data-at]");
    if (chip) pickExpert(...chip.dataset.at.split(",").map(Number));
  });
  onChange(["run", "layer"], fillExperts);
  onChange(["mode", "plan", "run", "a", "b", "span", "layer", "expert", "numbers"], () => { paint(); showToken(); });
  addEventListener("hashchange", fromHash);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; showToken(); } });
  const opened = [];
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details:not([open])").forEach((d) => { d.open = true; opened.push(d); });
    printing = true;
    write(0, T);
    showToken();
  });
  addEventListener("afterprint", () => {
    while (opened.length) opened.pop().open = false;
    printing = false;
    showToken();
  });
}

async function start() {
  if (!("DecompressionStream" in window)) {
    byId("readout").textContent = "This browser cannot unpack the routes; the text and the tables are shown as they were saved.";
    return;
  }
  await Promise.all(D.models.map(unpack));
  document.querySelectorAll(".controls, #strip, #token, #keys").forEach((c) => { c.hidden = false; });
  if (compared) {
    byId("mode").value = KL;
    byId("a").value = D.models.length > 2 ? 1 : 0;
    byId("b").value = D.models.length > 2 ? 2 : 1;
    picked = D.models[1].kl.indexOf(Math.max(...D.models[1].kl));
  }
  byId("expert").options[0].value = "-1";
  fillExperts();
  listen();
  paint();
  pickToken(picked);
  fromHash();
  byId("text").dataset.ready = "yes";
}
start();
