// What a heat map is drawn on: SVG with an element per cell, or for many cells a canvas.
// Both have: paint(picture), focus(layer, expert), place(layer, expert), hide(), at(event), lay().
// picture: {shades: palette step of each cell, kept: flags or null, label: of the map, describe: i -> words}

function svgSurface(svg) {
  const cells = [];
  svg.setAttribute("role", "grid");
  svg.setAttribute("aria-rowcount", D.layers);
  svg.setAttribute("aria-colcount", D.experts);
  const cursor = svg.querySelector(".cursor");
  cursor.setAttribute("role", "presentation");
  svg.querySelectorAll("text").forEach((t) => t.setAttribute("aria-hidden", "true"));
  svg.querySelectorAll("g").forEach((row) => { row.setAttribute("role", "row"); cells.push(...row.children); });
  cells.forEach((cell, i) => {
    cell.setAttribute("role", "gridcell");
    cell.setAttribute("tabindex", i ? "-1" : "0");
    cell.dataset.at = Math.floor(i / D.experts) + "," + (i % D.experts);
  });
  let stop = 0;  // the one cell in the page's tab order
  const hide = () => cursor.setAttribute("visibility", "hidden");
  return {
    element: svg,
    hide,
    lay() {},
    at: (event) => (event.target.dataset && event.target.dataset.at ? event.target.dataset.at.split(",").map(Number) : null),
    place(layer, expert) {
      const cell = cells[layer * D.experts + expert];
      cursor.setAttribute("x", cell.x.baseVal.value - 1);
      cursor.setAttribute("y", cell.y.baseVal.value - 1);
      cursor.setAttribute("visibility", "visible");
    },
    rove(layer, expert) {
      cells[stop].setAttribute("tabindex", "-1");
      stop = layer * D.experts + expert;
      cells[stop].setAttribute("tabindex", "0");
    },
    focus(layer, expert) {
      this.rove(layer, expert);
      const target = cells[stop];
      target.focus({ preventScroll: true });
      const scroll = svg.parentElement, cell = target.getBoundingClientRect(), box = scroll.getBoundingClientRect();
      if (cell.left < box.left + 44) scroll.scrollLeft -= box.left + 44 - cell.left;
      if (cell.right > box.right - 8) scroll.scrollLeft += cell.right - box.right + 8;
      if (cell.top < 0 || cell.bottom > innerHeight) target.scrollIntoView({ block: "nearest" });
    },
    paint({ shades, kept, label, describe }) {
      const dots = [];
      cells.forEach((cell, i) => {
        cell.setAttribute("class", "q" + shades[i]);
        cell.setAttribute("aria-label", describe(i));
        if (kept && kept[i])
          dots.push(`M${cell.x.baseVal.value + cell.width.baseVal.value / 2} ${cell.y.baseVal.value + cell.height.baseVal.value / 2}h0`);
      });
      svg.querySelectorAll(".rim, .dot").forEach((p) => p.setAttribute("d", dots.join("")));
      svg.setAttribute("aria-label", label);
    },
  };
}

// One pixel per cell, scaled by the style sheet: quick to paint at any size of cell.
function canvasSurface(box) {
  const canvas = make("canvas", { width: D.experts, height: D.layers, tabindex: "0", role: "application",
    "aria-roledescription": "heat map", "aria-describedby": "map-readout" });
  const cursor = make("div", { class: "cursor", hidden: "" });
  const above = make("div", { class: "experts", "aria-hidden": "true" }), beside = make("div", { class: "layers", "aria-hidden": "true" });
  const field = make("div", { class: "field" }, canvas, cursor);
  box.replaceChildren(make("div", { class: "corner", "aria-hidden": "true" }, "layer"), above, beside, field);
  box.hidden = false;
  byId("map-readout").setAttribute("aria-live", "polite");  // a canvas has no cells to read out
  let w = 2, h = 6;
  const spaced = (count, size, least) => {
    let every = 1;
    while (every * size < least) every *= 2;
    return Array.from({ length: Math.ceil(count / every) }, (_, i) => i * every);
  };
  const inks = () => (printing ? D.palette : [...document.querySelectorAll(".scale rect")].map((r) => getComputedStyle(r).fill))
    .map((c) => (c[0] === "#" ? [1, 3, 5].map((k) => parseInt(c.slice(k, k + 2), 16)) : c.match(/\d+/g).map(Number)));
  return {
    element: canvas,
    rove() {},
    hide() { cursor.hidden = true; },
    at(event) {
      if (event.target !== canvas) return null;
      const area = canvas.getBoundingClientRect();
      const expert = Math.floor((event.clientX - area.left) / w), layer = Math.floor((event.clientY - area.top) / h);
      return layer >= 0 && layer < D.layers && expert >= 0 && expert < D.experts ? [layer, expert] : null;
    },
    place(layer, expert) {
      Object.assign(cursor.style, { left: expert * w - 2 + "px", top: layer * h - 2 + "px", width: w + 4 + "px", height: h + 4 + "px" });
      cursor.hidden = false;
    },
    focus(layer, expert) {
      canvas.focus({ preventScroll: true });
      this.place(layer, expert);
      cursor.scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
    },
    // Sizes and axis labels for the chosen size of cells and the width of the page.
    lay() {
      const size = [null, 4, 8, 14][chosen("map-zoom")];
      if (printing) [w, h] = [640 / D.experts, Math.min(7, 820 / D.layers)];
      else {
        w = size || Math.min(14, Math.max(2, Math.floor((box.parentElement.clientWidth - 44) / D.experts)));
        h = size ? Math.max(size, 7) : Math.max(w, 6);
      }
      Object.assign(canvas.style, { width: D.experts * w + "px", height: D.layers * h + "px" });
      const label = (n, side, at) => {
        const e = make("span", null, String(n));
        e.style[side] = at + "px";
        return e;
      };
      above.replaceChildren(...spaced(D.experts, w, 34).map((n) => label(n, "left", (n + 0.5) * w)));
      beside.replaceChildren(...spaced(D.layers, h, 14).map((n) => label(n, "top", (n + 0.5) * h)));
    },
    paint({ shades, kept, label }) {
      const context = canvas.getContext("2d", { willReadFrequently: true }), image = context.createImageData(D.experts, D.layers), colours = inks();
      for (let i = 0; i < CELLS; i++) {
        if (kept && !kept[i]) continue;  // stays blank
        const [r, g, b] = colours[shades[i]];
        image.data[4 * i] = r;
        image.data[4 * i + 1] = g;
        image.data[4 * i + 2] = b;
        image.data[4 * i + 3] = 255;
      }
      context.putImageData(image, 0, 0);
      canvas.setAttribute("aria-label", label);
    },
  };
}
