// The sample browser. It reads the JSON that irlfast/reports/browser.py wrote into the page: the names of the models,
// the figures of answers, the title of each figure, and rows {number, prompt, expert, rejected, answers}. An answer is null or
// {pieces, figures, tokens, samples}, and a sample {text, figures}. Every text becomes text of the page by `textContent`, never markup.
"use strict";
(() => {
  const ROWS_PER_PAGE = 50;
  const LEAST = 0.1; // a token's log-ratio in nats from which it is coloured
  const FULL_COLOUR = 1; // and from which the colour is full
  if (!part("data")) return; // the page has no samples
  const {models, first, kept, figures, titles, rows} = JSON.parse(part("data").textContent);
  const columns = [
    {name: "expert", text: (row) => row.expert, more: () => [], render: renderExpert},
    {name: "rejected", text: (row) => row.rejected, more: () => [], render: (row) => renderText(row.rejected)},
    ...models.map((name, i) => ({
      name,
      text: (row) => textOf(row, i),
      more: (row) => (row.answers[i]?.samples ?? []).map(({text}) => text),
      render: (row) => renderAnswer(row.answers[i]),
    })),
  ].filter((column) => rows.some((row) => column.text(row) !== undefined));
  let page = 0;

  function part(name) {
    return document.getElementById(`samples-${name}`);
  }

  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function count(number) {
    return number.toLocaleString("en");
  }

  function decimal(number) {
    return Number.isInteger(number) ? count(number) : number.toFixed(Math.abs(number) < 10 ? 3 : 1);
  }

  function textOf(row, model) {
    const pieces = row.answers[model]?.pieces.filter(([kind]) => kind !== "-");
    return pieces?.map(([, text]) => text).join("");
  }

  function figureOf(row, model, name) {
    return row.answers[model]?.figures[name] ?? NaN;
  }

  // The lists to choose from. They depend on the two models that are compared.

  function compared() {
    return [part("from").selectedIndex, part("to").selectedIndex];
  }

  function filters() {
    const [from, to] = compared();
    const right = (before, after) => (row) =>
      figureOf(row, from, "exact_match") === before && figureOf(row, to, "exact_match") === after;
    const list = [
      {group: "", name: "all prompts", keep: () => true},
      {group: "", name: "answer changed", keep: (row) => textOf(row, from) !== textOf(row, to)},
    ];
    const changes = [["gained", 0, 1], ["lost", 1, 0], ["kept right", 1, 1], ["never right", 0, 0]];
    for (const [name, before, after] of "exact_match" in figures ? changes : []) {
      list.push({group: "identical to the expert", name, keep: right(before, after)});
    }
    for (const [name, {title, better}] of Object.entries(figures).filter(([name]) => name !== "exact_match")) {
      const change = (row) => figureOf(row, to, name) - figureOf(row, from, name);
      const higher = (row) => change(row) > 0;
      const lower = (row) => change(row) < 0;
      const [first, second] = better === "lower" ? [lower, higher] : [higher, lower];
      const [one, two] = better ? ["better", "worse"] : ["higher", "lower"];
      list.push({group: title, name: `${title}: ${one}`, keep: first});
      list.push({group: title, name: `${title}: ${two}`, keep: second});
      list.push({group: title, name: `${title}: equal`, keep: (row) => change(row) === 0});
    }
    return list;
  }

  function orders() {
    const [from, to] = compared();
    const list = [
      {name: "as in the file", key: (row) => row.number},
      {name: "length of the prompt", key: (row) => row.prompt?.length},
      {name: "length of the expert's answer", key: (row) => row.expert?.length},
      {name: `length of the answer of ${models[to]}`, key: (row) => textOf(row, to)?.length},
    ];
    for (const [name, {title}] of Object.entries(figures)) {
      list.push({name: `${title} of ${models[to]}`, key: (row) => figureOf(row, to, name)});
      list.push({name: `change of ${title}`, key: (row) => figureOf(row, to, name) - figureOf(row, from, name)});
    }
    return list;
  }

  function selectedOrder() {
    return orders()[part("order").selectedIndex];
  }

  function shownColumns() {
    return columns.filter((column) => column.box.checked);
  }

  function searchedText() {
    return part("search").value.normalize().toLowerCase();
  }

  function includes(text, searched) {
    return (text ?? "").normalize().toLowerCase().includes(searched);
  }

  function selectedRows() {
    const {keep} = filters()[part("filter").selectedIndex];
    const {key} = selectedOrder();
    const sign = part("descending").checked ? -1 : 1;
    const searched = searchedText();
    const shown = shownColumns();
    const texts = (row) => [row.prompt, ...shown.flatMap((column) => [column.text(row), ...column.more(row)])];
    const keyed = rows
      .filter((row) => keep(row) && texts(row).some((text) => includes(text, searched)))
      .map((row) => [row, key(row) ?? NaN]);
    keyed.sort(([, a], [, b]) => Number.isNaN(a) - Number.isNaN(b) || sign * (a - b) || 0); // missing values come last
    return keyed.map(([row]) => row);
  }

  // One row of the page

  function renderText(text) {
    return element("div", {className: "text", dir: "auto", textContent: text});
  }

  function renderTag(text) {
    return element("span", {className: "tag", textContent: text});
  }

  function renderAnswer(answer) {
    const tags = {"=": "span", "+": "mark", "-": "del"};
    const text = renderText("");
    text.append(...answer.pieces.map(([kind, piece]) => element(tags[kind], {textContent: piece})));
    const cell = element("div", {}, text);
    if (answer.figures.exact_match === 1) cell.append(renderTag("✓ identical"));
    if (answer.pieces.every(([kind]) => kind === "-")) cell.append(renderTag("empty"));
    if (part("figures").checked) cell.append(renderFigures(answer.figures));
    if (answer.samples) cell.append(renderSamples(answer));
    return cell;
  }

  function renderFigures(values) {
    const known = Object.entries(values).filter(([, value]) => value !== null);
    const items = known.flatMap(([name, value]) => [
      element("dt", {textContent: titles[name]}),
      element("dd", {textContent: decimal(value)}),
    ]);
    return element("dl", {}, ...items);
  }

  function renderSamples({samples, sample_count: total}) {
    const hidden = total - samples.length;
    const label = `${count(total)} samples${hidden ? `, the first ${count(samples.length)}` : ""}`;
    const items = samples.map((sample) => {
      const item = element("li", {}, renderText(sample.text));
      if (sample.figures.exact_match === 1) item.append(renderTag("✓ identical"));
      if (part("figures").checked) item.append(renderFigures(sample.figures));
      return item;
    });
    const searched = searchedText();
    const open = searched !== "" && samples.some(({text}) => includes(text, searched));
    return element("details", {open}, element("summary", {textContent: label}), element("ol", {}, ...items));
  }

  function tokenRatios(row) {
    const [before, after] = compared().map((model) => row.answers[model]?.tokens);
    const same = before?.length === after?.length && before?.every(([text], i) => text === after[i][0]);
    return same ? after.map(([text, logp], i) => [text, logp - before[i][1]]) : undefined;
  }

  function renderExpert(row) {
    const ratios = part("colours").checked ? tokenRatios(row) : undefined;
    if (!ratios) return renderText(row.expert);
    const text = renderText("");
    for (const [token, ratio] of ratios) {
      const title = `${ratio > 0 ? "+" : ""}${ratio.toFixed(2)} nats`;
      const kind = Math.abs(ratio) < LEAST ? "" : ratio > 0 ? "more" : "less";
      const made = element("span", {className: `token ${kind}`, textContent: token, title});
      made.style.setProperty("--share", Math.min(Math.abs(ratio) / FULL_COLOUR, 1));
      text.append(made);
    }
    return text;
  }

  function renderRow(row) {
    const {name, key} = selectedOrder();
    const value = key(row) ?? NaN;
    const sorted = name === "as in the file" || Number.isNaN(value) ? "" : ` · ${name} ${decimal(value)}`;
    const prompt = element("div", {className: "cell"}, element("h3", {textContent: `prompt ${row.number}${sorted}`}));
    prompt.append(renderText(row.prompt ?? ""));
    const cells = shownColumns().map((column) => {
      const cell = element("div", {className: "cell"}, element("p", {className: "name", textContent: column.name}));
      cell.append(column.text(row) === undefined ? renderTag("missing") : column.render(row));
      return cell;
    });
    return element("li", {className: "card"}, prompt, ...cells);
  }

  // The page

  function render() {
    const selected = selectedRows();
    const pages = Math.max(1, Math.ceil(selected.length / ROWS_PER_PAGE));
    page = Math.min(page, pages - 1);
    const shown = selected.slice(page * ROWS_PER_PAGE, (page + 1) * ROWS_PER_PAGE);
    part("rows").replaceChildren(...shown.map(renderRow));
    part("status").textContent = `${count(selected.length)} of ${count(rows.length)} prompts`;
    part("page").textContent = `page ${page + 1} of ${pages}`;
    part("pages").hidden = pages === 1;
    part("previous").disabled = page === 0;
    part("next").disabled = page === pages - 1;
    const [from, to] = compared();
    part("legend").hidden = !part("colours").checked;
    part("legend").textContent =
      `The tokens of the expert's answer: a solid underline where ${models[to]} finds a token more likely than ` +
      `${models[from]} by ${LEAST} nats or more, a dotted one where less likely. The colour is full from ` +
      `${FULL_COLOUR} nat on. A token's title gives the difference.`;
  }

  function fill(select, options) {
    const index = select.selectedIndex;
    const groups = Map.groupBy(options, ({group}) => group);
    const made = [...groups].map(([label, members]) => {
      const items = members.map(({name, matching}) =>
        element("option", {textContent: matching === undefined ? name : `${name} (${count(matching)})`}));
      return label ? [element("optgroup", {label}, ...items)] : items;
    });
    select.replaceChildren(...made.flat());
    select.selectedIndex = Math.max(index, 0);
  }

  function fillLists() {
    fill(part("filter"), filters().map((filter) => ({...filter, matching: rows.filter(filter.keep).length})));
    fill(part("order"), orders());
  }

  function change() {
    page = 0;
    fillLists();
    render();
  }

  function turn(step) {
    page += step;
    render();
    part("title").scrollIntoView();
  }

  function start() {
    for (const [list, model] of [[part("from"), first], [part("to"), kept]]) {
      fill(list, models.map((name) => ({name})));
      list.selectedIndex = model;
    }
    for (const column of columns) {
      column.box = element("input", {type: "checkbox", autocomplete: "off"});
      column.box.checked = ["expert", models[first], models[kept]].includes(column.name);
      part("columns").append(element("label", {}, column.box, ` ${column.name}`));
    }
    part("colours-label").hidden = !rows.some((row) => row.answers.some((answer) => answer?.tokens));
    part("controls").addEventListener("input", change);
    part("previous").addEventListener("click", () => turn(-1));
    part("next").addEventListener("click", () => turn(1));
    part("controls").hidden = false;
    change();
  }

  start();
})();
