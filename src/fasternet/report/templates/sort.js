// The page's only script; without it the page is whole: tables unsorted, every engine shown, records as text inside.

// Column headings become buttons that sort their table.
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

// What a legend names by its engine gets a check box, which hides that engine's points, lines and rows.
for (const entry of document.querySelectorAll("figure .legend [data-engine]")) {
  const label = document.createElement("label");
  const box = document.createElement("input");
  box.type = "checkbox";
  box.checked = true;
  label.append(box, ...entry.childNodes);
  entry.append(label);
  box.addEventListener("change", () => {
    for (const part of entry.closest("figure").querySelectorAll("svg [data-engine], td [data-engine]")) {
      if (part.dataset.engine !== entry.dataset.engine) continue;
      (part.closest("tr") ?? part).classList.toggle("off", !box.checked);
    }
  });
}

// The records inside the page become a file.
const records = document.getElementById("records");
const download = document.getElementById("download-records");
if (records && download) {
  download.href = URL.createObjectURL(new Blob([records.textContent], { type: "application/jsonl" }));
}
