"use strict";
// The page is whole without this: it adds a theme switch, sortable tables and quicker tooltips.
const root = document.documentElement;
const button = document.getElementById("theme");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
try { const kept = localStorage.getItem("recover-theme"); if (kept) root.dataset.theme = kept; } catch { /* storage may be closed to files */ }
button.hidden = false;
name();
button.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("recover-theme", root.dataset.theme); } catch { /* the choice lasts for this page */ }
  name();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);

// Figures as the report words them: 12,346, 2.4×10⁻⁷, ×1.27 [1.2, 1.3], 97%, 190k, 6.35 MB.
const SIZES = { k: 1e3, M: 1e6, B: 1e9, kB: 1e3, MB: 1e6, GB: 1e9 };
const figure = (text) => {
  const found = /^×?([+\-−]?[\d,]*\.?\d+)(?:×10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+))?(?: ?(kB|MB|GB|k|M|B|%))?(?= |$|\[)/.exec(text);
  if (!found) return NaN;
  const power = found[2] ? parseInt([...found[2]].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹".indexOf(c)).map((k) => (k ? k - 1 : "-")).join(""), 10) : 0;
  return parseFloat(found[1].replaceAll(",", "").replace("−", "-")) * 10 ** power * (SIZES[found[3]] ?? 1);
};
const value = (row, column) => {
  const cell = row.cells[column];
  const number = parseFloat(cell.dataset.value ?? "");
  const text = cell.textContent.trim();
  return Number.isNaN(number) ? (Number.isNaN(figure(text)) ? text : figure(text)) : number;
};
// Numbers first, then words, each in the direction asked for: what was not measured stays at the end.
const compare = (a, b, down) => (typeof a !== typeof b ? (typeof a === "number" ? -1 : 1)
  : (down ? -1 : 1) * (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true })));
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.textContent.trim()) return;
    head.setAttribute("aria-sort", "none");
    const press = document.createElement("button");
    press.type = "button";
    press.append(...head.childNodes);
    head.append(press);
    press.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].sort((a, b) => compare(value(a, column), value(b, column), down));
      table.tBodies[0].append(...rows);
    });
  });
}

// Items lost and won: those of a way, a task and a word.
const filter = document.querySelector("form.filter");
if (filter) {
  const items = [...document.querySelectorAll("details.item")];
  const choose = () => {
    const { way, task, text } = filter.elements;
    const word = text.value.toLowerCase();
    for (const item of items) {
      item.hidden = (way.value && item.dataset.way !== way.value) || (task.value && item.dataset.task !== task.value)
        || (word && !item.textContent.toLowerCase().includes(word));
    }
    filter.querySelector("output").textContent = `${items.filter((item) => !item.hidden).length} of ${items.length}`;
  };
  filter.hidden = false;
  filter.addEventListener("input", choose);
  filter.addEventListener("submit", (event) => event.preventDefault());
  choose();
}

const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
for (const title of document.querySelectorAll(".plot title")) {
  title.parentElement.dataset.tip = title.textContent;
  title.remove();
}
document.addEventListener("pointermove", (event) => {
  const text = event.target.closest?.("[data-tip]")?.dataset.tip;
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${event.clientY - box.height - 12 < 8 ? event.clientY + 18 : event.clientY - box.height - 12}px`;
});
