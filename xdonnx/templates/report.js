"use strict";
// The plot of the layers: pointer, finger or arrow keys read a layer's numbers, the buttons sort plot and table alike.
// Without this script the plot still stands and the table below it says everything.
(() => {
  const plot = document.querySelector(".cols");
  // Paper cannot be unfolded.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
  if (!plot) return;
  const layers = JSON.parse(document.getElementById("layers").textContent);
  const picture = plot.querySelector("svg");
  const columns = [...picture.querySelectorAll(".col")];
  const body = document.querySelector(".layers tbody");
  const rows = [...body.rows];
  const readout = document.querySelector(".readout");
  const narrowest = 4;
  const widest = 80;
  let order = layers.map((_, at) => at);
  let width = narrowest;
  let current = -1;

  function draw() {
    width = Math.min(widest, Math.max(narrowest, plot.clientWidth / layers.length));
    const total = width * layers.length;
    picture.setAttribute("width", total);
    picture.setAttribute("viewBox", `0 0 ${total} ${picture.getAttribute("height")}`);
    picture.querySelectorAll(".grid").forEach((line) => line.setAttribute("x2", total));
    const gap = width > 6 ? Math.min(6, width / 4) : 0.5;
    order.forEach((layer, place) => {
      const column = columns[layer];
      column.setAttribute("transform", `translate(${place * width} 0)`);
      for (const part of column.children) {
        if (part.classList.contains("hit")) part.setAttribute("width", width);
        else if (part.tagName === "rect") { part.setAttribute("x", gap / 2); part.setAttribute("width", width - gap); }
        else if (part.classList.contains("gain")) { part.setAttribute("x1", width / 2); part.setAttribute("x2", width / 2); }
        else if (part.tagName === "line") { part.setAttribute("x1", gap / 2); part.setAttribute("x2", width - gap / 2); }
      }
    });
  }

  // A name may be broken before a slash and behind a dot or an underscore.
  function soft(name) {
    const parts = name.match(/\/?[^/._]*[._]?/g);
    return parts.flatMap((part) => [part, document.createElement("wbr")]);
  }

  function pick(place, follow) {
    place = Math.max(0, Math.min(layers.length - 1, place));
    columns.forEach((column) => column.classList.remove("on"));
    rows.forEach((row) => row.classList.remove("on"));
    const layer = layers[order[place]];
    current = place;
    columns[order[place]].classList.add("on");
    rows[order[place]].classList.add("on");
    readout.querySelector("b").replaceChildren(...soft(layer.name));
    const list = readout.querySelector("dl");
    list.replaceChildren(...layer.facts.map(([key, value]) => {
      const pair = document.createElement("div");
      const term = document.createElement("dt");
      const text = document.createElement("dd");
      term.textContent = key;
      text.textContent = value;
      pair.append(term, text);
      return pair;
    }));
    plot.setAttribute("aria-valuenow", place + 1);
    plot.setAttribute("aria-valuetext", [layer.name, ...layer.facts.map((pair) => pair.join(" "))].join(", "));
    if (follow) {
      const left = place * width;
      if (left < plot.scrollLeft) plot.scrollLeft = left;
      else if (left + width > plot.scrollLeft + plot.clientWidth) plot.scrollLeft = left + width - plot.clientWidth;
    }
  }

  function at(event) {
    return Math.floor((event.clientX - picture.getBoundingClientRect().left) / width);
  }

  function sort(key) {
    const layer = current < 0 ? -1 : order[current];
    const known = (place) => layers[place][key];
    order = layers.map((_, place) => place);
    // What is not known goes last; equals keep the order of the graph.
    if (key === "error") order.sort((a, b) => (known(b) ?? -1) - (known(a) ?? -1) || a - b);
    if (key === "kept") order.sort((a, b) => known(a) - known(b) || a - b);
    draw();
    body.append(...order.map((place) => rows[place]));
    document.querySelectorAll(".sort button").forEach((button) => {
      button.setAttribute("aria-pressed", String(button.dataset.key === key));
    });
    if (layer >= 0) pick(order.indexOf(layer), true);
  }

  const steps = {
    ArrowRight: () => current + 1, ArrowUp: () => current + 1, ArrowLeft: () => current - 1, ArrowDown: () => current - 1,
    PageUp: () => current + 10, PageDown: () => current - 10, Home: () => 0, End: () => layers.length - 1,
  };
  plot.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    pick(step(), true);
  });
  plot.addEventListener("focus", () => { if (current < 0) pick(0, true); });
  plot.addEventListener("pointermove", (event) => pick(at(event), false));
  plot.addEventListener("pointerdown", (event) => pick(at(event), false));
  document.querySelectorAll(".sort button").forEach((button) => {
    button.addEventListener("click", () => sort(button.dataset.key));
  });
  rows.forEach((row, layer) => row.addEventListener("click", () => pick(order.indexOf(layer), true)));

  // The tooltips of the plain picture would cover the readout.
  picture.querySelectorAll("title").forEach((title) => title.remove());
  const attributes = { role: "slider", tabindex: "0", "aria-valuemin": "1", "aria-valuemax": String(layers.length) };
  for (const [name, value] of Object.entries(attributes)) plot.setAttribute(name, value);
  document.querySelector(".sort").hidden = false;
  readout.hidden = false;
  addEventListener("resize", draw);
  draw();
  pick(0, false);
})();
