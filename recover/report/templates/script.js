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

const value = (row, column) => {
  const cell = row.cells[column];
  const number = parseFloat(cell.dataset.value ?? "");
  return Number.isNaN(number) ? cell.textContent.trim() : number;
};
const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : typeof a === "number" ? -1 : typeof b === "number" ? 1
  : a.localeCompare(b, undefined, { numeric: true }));
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const press = document.createElement("button");
    press.type = "button";
    press.append(...head.childNodes);
    head.append(press);
    press.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].sort((a, b) => compare(value(a, column), value(b, column)));
      table.tBodies[0].append(...(down ? rows.reverse() : rows));
    });
  });
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
