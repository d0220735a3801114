"use strict";
document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[0];
  const value = (row, i) => {
    const text = row.cells[i].dataset.v ?? row.cells[i].textContent.trim();
    return text === "" ? -Infinity : isNaN(text) ? text.toLowerCase() : Number(text);
  };
  table.querySelectorAll("th").forEach((th, i) => {
    if (th.dataset.fixed !== undefined) return;
    th.tabIndex = 0;
    const sort = () => {
      const up = th.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a, i), value(b, i)];
        const order = typeof x === typeof y ? (x > y) - (x < y) : typeof x === "number" ? -1 : 1;
        return up ? order : -order;
      });
      body.append(...rows);
    };
    th.addEventListener("click", sort);
    th.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
});
const filter = document.getElementById("filter");
if (filter) {
  filter.hidden = false;
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    document.querySelectorAll("[data-text]").forEach((item) => {
      item.hidden = !words.every((word) => item.dataset.text.toLowerCase().includes(word));
    });
  });
}
