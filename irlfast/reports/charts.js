"use strict";
// Draw every chart of the page. Its Vega-Lite specification, with the data, is the JSON after its place.
// SVG takes the page's CSS variables as colours, so that dark mode and print need no second drawing.
// `ast` has Vega interpret its expressions: the page's content security policy allows no eval.
const text = { labelColor: "var(--muted)", titleColor: "var(--muted)" };
const look = {
  background: "transparent",
  font: "inherit",
  view: { stroke: null },
  axis: { ...text, domainColor: "var(--line)", gridColor: "var(--line)", tickColor: "var(--line)", labelFontSize: 11 },
  axisX: { grid: false },
  axisY: { domain: false, ticks: false, tickCount: 5 },
  legend: { ...text, orient: "bottom", title: null },
  range: { category: ["--expert", "--synthetic", "--good", "--warm", "--bad", "--muted"].map((name) => `var(${name})`) },
  line: { color: "var(--expert)", strokeWidth: 1.8, strokeCap: "round" },
  point: { color: "var(--expert)" },
  rule: { color: "var(--expert)" },
  bar: { color: "var(--expert)" },
  text: { color: "var(--muted)", fontSize: 11 },
  style: {
    band: { opacity: 0.2, line: false },
    level: { color: "var(--muted)", strokeWidth: 1 },
    stage: { color: "var(--muted)", strokeWidth: 0.8, strokeDash: [2, 2] },
    "stage-name": { fill: "var(--muted)", fontSize: 11 },
  },
};
const options = { mode: "vega-lite", renderer: "svg", ast: true, actions: false, defaultStyle: false, config: look };
for (const place of document.querySelectorAll(".chart")) {
  vegaEmbed(place, JSON.parse(place.nextElementSibling.textContent), {
    ...options,
    tooltip: { disableDefaultStyle: true },
  });
}
