"use strict";
// The charts of a sweep: pointer, finger or a row of the table read a point's numbers, the heads of the table sort it.
// Without this script the charts still stand, and the tables below them say everything.
(() => {
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
  for (const model of document.querySelectorAll(".model")) {
    if (!model.querySelector(".pareto")) continue;
    const facts = JSON.parse(model.querySelector("script.points").textContent);
    const marks = [...model.querySelectorAll(".mark")];
    const body = model.querySelector("table.points tbody");
    const rows = [...body.rows];
    const readout = model.querySelector(".readout");

    function pick(at) {
      [...marks, ...rows].forEach((part) => part.classList.remove("on"));
      marks[at].classList.add("on");
      rows[at].classList.add("on");
      // The last one lies on top.
      marks[at].parentNode.append(marks[at]);
      readout.hidden = false;
      readout.querySelector("b").textContent = facts[at].slice(0, -3).map((pair) => pair.join(" ")).join(", ");
      readout.querySelector("dl").replaceChildren(...facts[at].slice(-3).map(([key, value]) => {
        const pair = document.createElement("div");
        const term = document.createElement("dt");
        const text = document.createElement("dd");
        term.textContent = key;
        text.textContent = value;
        pair.append(term, text);
        return pair;
      }));
    }

    marks.forEach((mark, at) => {
      mark.querySelector("title").remove();
      // Of the marks under a finger the nearest counts, which is the one that was hit.
      mark.addEventListener("pointerenter", () => pick(at));
      mark.addEventListener("click", () => pick(at));
    });
    rows.forEach((row, at) => row.addEventListener("click", () => pick(at)));
    const buttons = [...model.querySelectorAll("button[data-key]")];
    buttons.forEach((button) => {
      button.disabled = false;
      button.addEventListener("click", () => {
        const { key, way } = button.dataset;
        body.append(...[...rows].sort((a, b) => way * (a.dataset[key] - b.dataset[key])));
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      });
    });
  }
})();
