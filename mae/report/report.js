"use strict";
// Figures under the pointer, hidden lines, and the slider. Without this script the page shows everything but these.
for (const chart of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(chart.querySelector("script").textContent);
  const plot = chart.querySelector(".plot"), cross = plot.querySelector(".cross"), tip = plot.querySelector(".tip");
  const hidden = new Set();
  let place = null; // from 0 to 1000
  const nearest = (xs, x) => xs.reduce((best, value, at) => (Math.abs(value - x) < Math.abs(xs[best] - x) ? at : best), 0);
  const show = () => {
    const lines = data.lines.filter((_, number) => !hidden.has(number));
    cross.hidden = tip.hidden = place === null || lines.length === 0;
    if (tip.hidden) return;
    const first = lines.map((line) => line.x[nearest(line.x, place)]).sort((a, b) => Math.abs(a - place) - Math.abs(b - place))[0];
    cross.style.left = first / 10 + "%";
    tip.replaceChildren();
    const head = document.createElement("b");
    const owner = lines.find((line) => line.x.includes(first));
    head.textContent = data.x + " " + owner.at[owner.x.indexOf(first)];
    tip.append(head);
    for (const line of lines) {
      const row = document.createElement("span"), dot = document.createElement("i");
      dot.style.background = "var(--s" + line.color + ")";
      row.append(dot, line.name + "  " + line.y[nearest(line.x, first)]);
      tip.append(row);
    }
    const isRight = first > 550;
    tip.style.left = isRight ? "auto" : "calc(" + first / 10 + "% + 10px)";
    tip.style.right = isRight ? "calc(" + (100 - first / 10) + "% + 10px)" : "auto";
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    place = (1000 * (event.clientX - box.left)) / box.width;
    show();
  });
  plot.addEventListener("pointerleave", () => { place = null; show(); });
  plot.addEventListener("blur", () => { place = null; show(); });
  plot.addEventListener("keydown", (event) => {
    const xs = [...new Set(data.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const at = place === null ? xs.length - 1 : nearest(xs, place);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: xs.length - 1 }[event.key];
    if (event.key === "Escape") place = null;
    else if (to === undefined) return;
    else place = xs[Math.max(0, Math.min(xs.length - 1, place === null ? at : to))];
    event.preventDefault();
    show();
  });
  for (const button of chart.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const number = Number(button.dataset.line), isShown = hidden.has(number);
      if (isShown) hidden.delete(number); else hidden.add(number);
      button.setAttribute("aria-pressed", String(isShown));
      chart.querySelector('g[data-line="' + number + '"]').toggleAttribute("hidden", !isShown);
    });
  }
}
for (const box of document.querySelectorAll(".through-time")) {
  const slider = box.querySelector("input"), output = box.querySelector("output"), play = box.querySelector("button");
  const frames = [...box.querySelectorAll(".frames img")];
  let timer = null;
  const show = () => {
    frames.forEach((frame, number) => { frame.hidden = number !== Number(slider.value); });
    output.textContent = frames[slider.value].dataset.name;
    slider.setAttribute("aria-valuetext", output.textContent);
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  slider.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (Number(slider.value) === frames.length - 1) slider.value = 0;
    play.textContent = "Stop";
    show();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) === frames.length - 1) stop();
    }, 600);
  });
  box.querySelector(".slider").hidden = false;
  show();
}
