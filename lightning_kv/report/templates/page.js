document.documentElement.classList.add("js");

// A click on a head sorts by it; empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const first = head.dataset.better === "more" ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const each of heads) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const number = x - y;
      return sign * (Number.isNaN(number) ? x.localeCompare(y, undefined, { numeric: true }) : number);
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(compare));
  }));
}

// One metric at a time, the same in all charts.
const choose = (metric) => {
  for (const tab of document.querySelectorAll(".tab")) tab.classList.toggle("chosen", tab.dataset.metric === metric);
  for (const button of document.querySelectorAll(".tabs button")) button.setAttribute("aria-pressed", button.dataset.metric === metric);
};
for (const button of document.querySelectorAll(".tabs button")) button.addEventListener("click", () => choose(button.dataset.metric));
const firstTab = document.querySelector(".tab");
if (firstTab) choose(firstTab.dataset.metric);

// A click on a family in the legend fades the others; another click brings them back.
const chips = [...document.querySelectorAll(".legend button")];
const keep = (family) => {
  document.body.classList.toggle("faded", family !== null);
  for (const chip of chips) chip.setAttribute("aria-pressed", chip.dataset.family === family);
  for (const mark of document.querySelectorAll('svg g[id^="policy-"]')) mark.classList.toggle("kept", mark.id.startsWith(`policy-${family}-`));
  for (const chart of document.querySelectorAll(".charts figure")) chart.classList.toggle("kept", chart.querySelector("svg g.kept") !== null);
};
for (const chip of chips) chip.addEventListener("click", () => keep(chip.getAttribute("aria-pressed") === "true" ? null : chip.dataset.family));

// The button under a video shows how far the others are from the reference, at the same moment.
for (const group of document.querySelectorAll(".switch")) {
  const [pictures, difference] = group.children;
  const video = group.parentElement.querySelector("video");
  const sources = new Map([[pictures, video.src], [difference, video.dataset.difference]]);
  for (const [button, source] of sources) button.addEventListener("click", () => {
    if (button.getAttribute("aria-pressed") === "true") return;
    const [time, paused] = [video.currentTime, video.paused];
    for (const each of sources.keys()) each.setAttribute("aria-pressed", each === button);
    video.addEventListener("loadedmetadata", () => { video.currentTime = time; }, { once: true });
    video.autoplay = !paused;
    video.src = source;
  });
}

// Paper has no folds: they are open while a page is printed.
let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details:not([open])")];
  for (const fold of unfolded) fold.open = true;
});
addEventListener("afterprint", () => { for (const fold of unfolded) fold.open = false; });
