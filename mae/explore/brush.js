// Paint patches with mouse, pen or finger: from a visible patch on, all that are touched are hidden, from a hidden one shown.
const radius = 0.05; // of the wider side
let mark = null, marks = [];

function touched(event) {
  const box = element.querySelector(".patches").getBoundingClientRect();
  const columns = Number(props.columns), rows = Number(props.rows);
  const x = (event.clientX - box.x) / box.width, y = (event.clientY - box.y) / box.height;
  const inside = (at) => Math.floor(x * columns) === at % columns && Math.floor(y * rows) === Math.floor(at / columns);
  const scale = [box.width, box.height].map((side) => side / Math.max(box.width, box.height));
  const near = (at) => Math.hypot((x - ((at % columns) + 0.5) / columns) * scale[0], (y - (Math.floor(at / columns) + 0.5) / rows) * scale[1]) < radius;
  return [...marks.keys()].filter((at) => inside(at) || near(at));
}

function paint(event) {
  const patches = element.querySelectorAll(".patches i");
  for (const at of touched(event)) {
    marks[at] = mark;
    patches[at].classList.toggle("hidden", mark === "1");
  }
}

element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".brush") || event.button) return;
  event.preventDefault();
  marks = [...props.value];
  const [first] = touched(event);
  if (first === undefined) return;
  mark = marks[first] === "1" ? "0" : "1";
  paint(event);
});
addEventListener("pointermove", (event) => mark !== null && paint(event));
for (const end of ["pointerup", "pointercancel"]) {
  addEventListener(end, () => {
    if (mark === null) return;
    mark = null;
    props.value = marks.join("");
    trigger("input");
  });
}
