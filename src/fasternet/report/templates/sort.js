// Column headings become buttons that sort their table; without a script the table is still whole.
for (const heading of document.querySelectorAll("th[data-sortable]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...heading.childNodes);
  heading.append(button);
  button.addEventListener("click", () => {
    const table = heading.closest("table");
    const body = table.tBodies[0];
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    const value = (row) => {
      const cell = row.cells[heading.cellIndex];
      return cell.dataset.sort ?? (cell.querySelector(".none") ? "" : cell.textContent.trim());
    };
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = x - y || x.localeCompare(y, undefined, { numeric: true });
      return ascending ? order : -order;
    });
    for (const row of rows) row.classList.remove("break");
    body.append(...rows);
    for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  });
}
