"use strict";
// Everything that comes from the data is set as text or as the address of a picture, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const examples = data.examples;
  const CHUNK = 12;
  // Numbers of a continuum are no classes to filter by, and nearly all differ.
  const measured = Object.values(examples).some((example) => example.measured);

  // ---- small helpers --------------------------------------------------------------------------------------

  function make(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  }

  function draw(tag, attributes, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  function short(value) {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en");
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-3) return value.toExponential(2);
    return String(Number(value.toPrecision(3)));
  }

  function signed(value) {
    return value === null ? "–" : (value > 0 ? "+" : "") + short(value);
  }

  function textOf(key) {
    const example = examples[key];
    if (!example) return key;
    if (example.text === undefined) {
      const parts = [example.name, example.label, example.predicted];
      for (const part of example.parts || []) {
        parts.push(part.name, part.text, ...(part.row || []).flat());
      }
      example.text = parts.filter(Boolean).join(" ").toLowerCase();
    }
    return example.text;
  }

  function matches(key, wanted) {
    if (!wanted) return true;
    const example = examples[key];
    if (/^\d+$/.test(wanted) && example) {
      return example.index === Number(wanted) || (example.label || "").toLowerCase() === wanted;
    }
    return textOf(key).includes(wanted);
  }

  function labelsOf(keys) {
    if (measured) return [];
    const counts = new Map();
    for (const key of keys) {
      const label = examples[key] && examples[key].label;
      if (label !== undefined) counts.set(label, (counts.get(label) || 0) + 1);
    }
    const order = new Intl.Collator("en", { numeric: true });
    return [...counts.keys()].sort(order.compare);
  }

  // ---- an item ---------------------------------------------------------------------------------------------

  function showSignal(part) {
    const width = 220, height = 64;
    const values = part.signal.flat().filter((value) => value !== null);
    const low = Math.min(...values), span = Math.max(...values) - low || 1;
    const lines = part.signal.map((channel, number) => {
      let path = "", pen = "M";
      channel.forEach((value, place) => {
        if (value === null) { pen = "M"; return; }
        const x = (place / Math.max(1, channel.length - 1)) * width;
        path += `${pen}${x.toFixed(1)} ${(height - 3 - ((value - low) / span) * (height - 6)).toFixed(1)}`;
        pen = "L";
      });
      return draw("path", { d: path, class: `channel c${number}` });
    });
    const more = part.more ? `, ${part.more} more channels` : "";
    return make("figure", { class: "signal" },
      draw("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" }, ...lines),
      make("figcaption", {}, `${part.length.toLocaleString("en")} points, ${short(low)} to ${short(low + span)}${more}`));
  }

  function showPart(part) {
    let body;
    if (part.image) body = make("img", { src: part.image, alt: "", loading: "lazy" });
    else if (part.signal) body = showSignal(part);
    else if (part.row) {
      body = make("table", { class: "row" }, part.row.map(([name, value]) =>
        make("tr", {}, name === "" ? null : make("th", {}, name), make("td", {}, value))));
    } else body = make("p", { class: "text" }, part.text);
    return part.name ? [make("span", { class: "part-name" }, part.name), body] : [body];
  }

  function showItem(key) {
    const example = examples[key];
    const parts = (example && example.parts) || [];
    return make("div", { class: "item" }, parts.flatMap(showPart));
  }

  function isWide(key) {
    const example = examples[key];
    return ((example && example.parts) || []).some((part) => part.text || part.row || part.signal);
  }

  function link(key) {
    const example = examples[key];
    return make("a", { class: "index", href: `#${key}` }, example ? `#${example.index}` : key);
  }

  function chip(text, kind, title) {
    return make("span", { class: `chip ${kind || ""}`, title: title || null }, text);
  }

  function bar(score, largest) {
    const share = largest > 0 && score !== null ? Math.min(1, Math.abs(score) / largest) : 0;
    const fill = make("i", { class: score < 0 ? "minus" : "plus" });
    fill.style.width = `${(100 * share).toFixed(1)}%`;
    return make("span", { class: "bar" }, fill);
  }

  // ---- lists that grow while one scrolls ---------------------------------------------------------------------

  function growing(container, entries, build) {
    let next = 0;
    const more = make("div", { class: "more" });
    const count = make("p", { class: "count" });
    function grow() {
      const until = Math.min(entries.length, next + CHUNK);
      for (; next < until; next += 1) container.insertBefore(build(entries[next]), more);
      if (next >= entries.length) { watcher.disconnect(); more.remove(); }
    }
    const watcher = new IntersectionObserver((seen) => {
      if (!seen.some((entry) => entry.isIntersecting)) return;
      grow();
      // Where the end is still in sight there is no further event.
      if (next < entries.length) { watcher.unobserve(more); watcher.observe(more); }
    }, { rootMargin: "600px" });
    container.replaceChildren(count, more);
    container.dataset.entries = entries.length;
    grow();
    if (next < entries.length) watcher.observe(more);
    return (text) => { count.textContent = text; };
  }

  // ---- filters -----------------------------------------------------------------------------------------------

  function choice(name, title, options, onchange) {
    return make("label", {}, title, make("select", { name, onchange },
      options.map(([value, text]) => make("option", { value }, text))));
  }

  function classChoice(name, title, keys, extra, onchange) {
    const labels = labelsOf(keys);
    if (labels.length < 2 || labels.length > 200) return null;
    const options = [["all", "all"], ...extra, ...labels.map((label) => [`is:${label}`, label])];
    return choice(name, title, options, onchange);
  }

  function fitsClass(key, wanted, reference) {
    if (!wanted || wanted === "all") return true;
    const label = examples[key] && examples[key].label;
    if (wanted === "same") return label === (examples[reference] || {}).label;
    if (wanted === "other") return label !== (examples[reference] || {}).label;
    return label === wanted.slice(3);
  }

  function read(filters) {
    const values = {};
    for (const input of filters.querySelectorAll("select, input")) {
      values[input.name] = input.type === "checkbox" ? input.checked : input.value;
    }
    values.search = (values.search || "").trim().toLowerCase();
    return values;
  }

  function searchBox(update, hint) {
    return make("label", { class: "search" }, "Search",
      make("input", { type: "search", name: "search", placeholder: hint, oninput: update }));
  }

  // ---- queries and what influenced them ------------------------------------------------------------------------

  function queries(section, root) {
    const keys = section.rows.map((row) => row.query);
    const trainKeys = section.rows.flatMap((row) => [...row.top, ...row.bottom].map((pair) => pair[0]));
    const trainSet = [...new Set(trainKeys)];
    const anyWrong = keys.some((key) => examples[key].agrees === false);
    let only = null;
    const update = () => { only = null; refresh(); };
    const filters = make("form", { class: "filters", onsubmit: (event) => event.preventDefault() },
      searchBox(update, "number, label or text"),
      classChoice("queryClass", "Query's class", keys, [], update),
      classChoice("trainClass", "Training example's class", trainSet,
        [["same", "same as the query's"], ["other", "other than the query's"]], update),
      choice("sign", "Show", [["both", "both"], ["top", section.words.top.title.toLowerCase()],
        ["bottom", section.words.bottom.title.toLowerCase()]], update),
      anyWrong ? make("label", { class: "check" },
        make("input", { type: "checkbox", name: "wrong", onchange: update }), "only wrong predictions") : null);
    const list = make("div", { class: "queries" });
    const banner = make("p", { class: "banner", hidden: true });
    root.append(filters, banner, list);

    function visible(row, wanted) {
      const kept = (pairs) => pairs.filter(([key]) => fitsClass(key, wanted.trainClass, row.query));
      return {
        row,
        top: wanted.sign === "bottom" ? [] : kept(row.top),
        bottom: wanted.sign === "top" ? [] : kept(row.bottom),
      };
    }

    function refresh() {
      const wanted = read(filters);
      banner.hidden = only === null;
      if (only !== null) {
        banner.replaceChildren(`Only ${examples[only].name} is shown. `,
          make("a", { href: `#${section.id}`, onclick: () => update() }, "Show all"));
      }
      const shown = [];
      for (const row of section.rows) {
        if (only !== null ? row.query !== only : !fitsClass(row.query, wanted.queryClass)) continue;
        if (only === null && wanted.wrong && examples[row.query].agrees !== false) continue;
        const entry = visible(row, only === null ? wanted : {});
        if (only === null && wanted.trainClass && wanted.trainClass !== "all"
          && !entry.top.length && !entry.bottom.length) continue;
        if (only === null && wanted.search && !matches(row.query, wanted.search)
          && ![...entry.top, ...entry.bottom].some(([key]) => matches(key, wanted.search))) continue;
        shown.push({ ...entry, search: only === null ? wanted.search : "" });
      }
      const say = growing(list, shown, card);
      say(`${shown.length.toLocaleString("en")} of ${section.rows.length.toLocaleString("en")} queries`);
    }

    function card({ row, top, bottom, search }) {
      const query = examples[row.query];
      const largest = Math.max(...[...row.top, ...row.bottom].map((pair) => Math.abs(pair[1])), 0);
      const facts = [link(row.query)];
      if (query.label !== undefined) facts.push(chip(query.label, "", "label"));
      if (query.predicted !== undefined) {
        const kind = query.agrees === undefined ? "" : query.agrees ? "good" : "bad";
        const sure = query.confidence === undefined ? "" : ` (${Math.round(100 * query.confidence)}%)`;
        facts.push(chip(`predicted ${query.predicted}${sure}`, kind));
      }
      const residual = row.residual === undefined || row.residual === null ? null
        : make("p", { class: "dim" }, `residual ${short(row.residual)}`);
      return make("article", { class: "query", "data-query": row.query },
        make("div", { class: "asked" }, showItem(row.query), make("div", { class: "facts" }, facts), residual),
        make("div", { class: "answers" },
          end("top", section.words.top, top, row, largest, search),
          end("bottom", section.words.bottom, bottom, row, largest, search)));
    }

    function end(kind, words, pairs, row, largest, search) {
      if (!pairs.length) return null;
      return make("section", { class: `end ${kind}` },
        make("h3", {}, words.title, make("small", {}, words.explanation)),
        make("div", { class: pairs.some(([key]) => isWide(key)) ? "tiles wide" : "tiles" },
          pairs.map(([key, score]) => tile(key, score, row, largest, search))));
    }

    function tile(key, score, row, largest, search) {
      const example = examples[key];
      const query = examples[row.query];
      const differs = !measured && query.label !== undefined && example.label !== undefined && query.label !== example.label;
      const words = score < 0 ? section.words.falls : section.words.rises;
      const hit = search && matches(key, search) ? " hit" : "";
      return make("div", {
        class: `tile${hit}`, "data-train": key,
        title: `Without ${example.name}, ${words} by ${short(Math.abs(score))} (predicted).`,
      },
      showItem(key),
      make("div", { class: "facts" }, link(key),
        example.label === undefined ? null
          : chip(example.label, differs ? "differs" : "", differs ? "another label than the query's" : "label")),
      make("div", { class: "score" }, bar(score, largest), make("b", {}, signed(score))));
    }

    refresh();
    return {
      focus(key) {
        if (!keys.includes(key)) return false;
        only = key;
        refresh();
        return true;
      },
      release() { if (only !== null) update(); },
      mentions(key) {
        const found = [];
        for (const row of section.rows) {
          for (const [name, score] of [...row.top, ...row.bottom]) {
            if (name === key && !found.some(([query]) => query === row.query)) found.push([row.query, score]);
          }
        }
        return found.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).map(([query, score]) =>
          make("li", {}, make("a", { href: `#${query}` }, examples[query].name), `: ${signed(score)}`));
      },
    };
  }

  // ---- rankings of examples --------------------------------------------------------------------------------------

  function ranking(section, root) {
    const keys = section.rows.map((row) => row.example);
    const update = () => refresh();
    let column = null, ascending = false;
    const filters = make("form", { class: "filters", onsubmit: (event) => event.preventDefault() },
      searchBox(update, "number, label or text"),
      classChoice("trainClass", "Class", keys, [], update));
    const heads = section.columns.map((name, number) => make("th", { class: "number" },
      make("button", { type: "button", onclick: () => sortBy(number) }, name)));
    const body = make("tbody");
    const withReasons = section.rows.some((row) => row.reasons && row.reasons.length);
    const table = make("table", { class: "ranking" }, make("thead", {}, make("tr", {},
      make("th", {}, "rank"), make("th", {}, "example"), make("th", {}, "item"), ...heads,
      withReasons ? make("th", {}, "why") : null)), body);
    root.append(filters, table);
    const largest = Math.max(...section.rows.map((row) => Math.abs(row.values[0] || 0)), 0);
    const ranks = new Map(section.rows.map((row, place) => [row, place + 1]));

    function sortBy(number) {
      ascending = column === number ? !ascending : false;
      column = number;
      refresh();
    }

    function refresh() {
      const wanted = read(filters);
      const rows = section.rows.filter((row) => fitsClass(row.example, wanted.trainClass)
        && (!wanted.search || matches(row.example, wanted.search)
          || (row.reasons || []).some((reason) => reason.toLowerCase().includes(wanted.search))));
      if (column !== null) {
        const sign = ascending ? 1 : -1;
        rows.sort((a, b) => sign * ((a.values[column] ?? -Infinity) - (b.values[column] ?? -Infinity)));
      }
      growing(body, rows, line);
    }

    function line(row) {
      const example = examples[row.example];
      const values = row.values.map((value, number) => make("td", { class: "number" },
        number === 0 ? bar(value, largest) : null, make("span", {}, short(value))));
      return make("tr", { "data-train": row.example },
        make("td", { class: "rank" }, String(ranks.get(row))),
        make("td", {}, link(row.example), example.label === undefined ? null : chip(example.label)),
        make("td", {}, showItem(row.example)), ...values,
        withReasons ? make("td", { class: "reasons" }, (row.reasons || []).map((reason) => chip(reason))) : null);
    }

    refresh();
    return {
      mentions(key) {
        const row = section.rows.find((candidate) => candidate.example === key);
        if (!row) return [];
        const text = section.columns.map((name, number) => `${name} ${short(row.values[number])}`).join(", ");
        return [make("li", {}, `${section.title}: rank ${ranks.get(row)} (${text})`)];
      },
    };
  }

  // ---- a map of examples -------------------------------------------------------------------------------------------

  function frame(low, high, size, log) {
    const to = log ? (value) => Math.log10(Math.max(value, 1e-12)) : (value) => value;
    const from = to(low), span = to(high) - from || 1;
    return (value) => ((to(value) - from) / span) * size;
  }

  function axes(width, height, left, bottom, x, y) {
    const parts = [draw("line", { x1: left, y1: height - bottom, x2: width, y2: height - bottom, class: "axis" }),
      draw("line", { x1: left, y1: 0, x2: left, y2: height - bottom, class: "axis" })];
    const write = (text, place, kind) => {
      const node = draw("text", { ...place, class: `tick ${kind || ""}` });
      node.textContent = text;
      parts.push(node);
    };
    for (const [text, place] of x.ticks) {
      write(text, { x: left + place, y: height - bottom + 14, "text-anchor": "middle" });
    }
    for (const [text, place] of y.ticks) {
      write(text, { x: left - 5, y: height - bottom - place + 4, "text-anchor": "end" });
    }
    write(x.title, { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, "title");
    write(y.title, { transform: `translate(11 ${(height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "title");
    return parts;
  }

  function ticks(low, high, place) {
    const raw = (high - low) / 5 || 1;
    const unit = 10 ** Math.floor(Math.log10(raw));
    const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= raw);
    const found = [];
    for (let number = Math.ceil(low / step); number * step <= high; number += 1) {
      const value = Number((number * step).toPrecision(6));
      found.push([short(value), place(value)]);
    }
    return found;
  }

  function map(section, root) {
    const width = 760, height = 460, left = 58, bottom = 40;
    const [xs, ys] = [1, 2].map((place) => section.points.map((point) => point[place]));
    const bounds = [xs, ys].map((values) => values.reduce(
      ([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]));
    const placeX = frame(bounds[0][0], bounds[0][1], width - left - 12);
    const placeY = frame(bounds[1][0], bounds[1][1], height - bottom - 12);
    const dots = section.points.map(([key, x, y, shade]) => {
      const dot = draw("circle", {
        cx: (left + 4 + placeX(x)).toFixed(1), cy: (height - bottom - 4 - placeY(y)).toFixed(1), r: 4,
        class: `dot s${shade}`, "data-train": key,
      });
      const title = draw("title", {});
      title.textContent = `${key.replace("train-", "training example ")}: ${section.axes[0]} ${short(x)}, ${section.axes[1]} ${short(y)}`;
      dot.append(title);
      dot.addEventListener("click", () => { location.hash = key; });
      return dot;
    });
    const frameParts = axes(width, height, left, bottom,
      { title: section.axes[0], ticks: ticks(...bounds[0], (value) => 4 + placeX(value)) },
      { title: section.axes[1], ticks: ticks(...bounds[1], (value) => 4 + placeY(value)) });
    const legend = section.shades.map((name, number) => make("span", { class: `shade s${number}` }, name));
    root.append(make("p", { class: "legend" }, legend),
      draw("svg", { viewBox: `0 0 ${width} ${height}`, class: "map" }, ...frameParts, ...dots));
    const lines = new Map(section.points.map((point) => [point[0], point]));
    return {
      mentions(key) {
        const point = lines.get(key);
        return point ? [make("li", {},
          `${section.title}: ${section.axes[0]} ${short(point[1])}, ${section.axes[1]} ${short(point[2])}`)] : [];
      },
    };
  }

  // ---- charts --------------------------------------------------------------------------------------------------------

  function histogram(chart) {
    const width = 420, height = 220, left = 62, bottom = 38;
    const most = Math.max(...chart.counts, 1);
    const placeY = (count) => (count ? (Math.log10(count) + 0.3) / (Math.log10(most) + 0.3) : 0) * (height - bottom - 10);
    const placeX = frame(chart.edges[0], chart.edges[chart.edges.length - 1], width - left - 8);
    const columns = chart.counts.map((count, place) => {
      const x = left + placeX(chart.edges[place]);
      const middle = (chart.edges[place] + chart.edges[place + 1]) / 2;
      const node = draw("rect", {
        x, width: Math.max(1, left + placeX(chart.edges[place + 1]) - x - 1),
        y: height - bottom - placeY(count), height: placeY(count), class: middle < 0 ? "minus" : "plus",
      });
      const title = draw("title", {});
      title.textContent = `${short(chart.edges[place])} to ${short(chart.edges[place + 1])}: ${count.toLocaleString("en")}`;
      node.append(title);
      return node;
    });
    const counts = [1, 10, 100, 1e3, 1e4, 1e5, 1e6].filter((count) => count <= most);
    return draw("svg", { viewBox: `0 0 ${width} ${height}` },
      ...axes(width, height, left, bottom,
        { title: chart.axis, ticks: ticks(chart.edges[0], chart.edges[chart.edges.length - 1], placeX) },
        { title: "count", ticks: counts.map((count) => [short(count), placeY(count)]) }), ...columns);
  }

  function line(chart) {
    const width = 420, height = 220, left = 62, bottom = 38;
    const most = Math.max(...chart.y, 1e-12), least = chart.log ? most * 1e-5 : 0;
    const placeX = frame(chart.x[0], chart.x[chart.x.length - 1], width - left - 8);
    const placeY = frame(least, most, height - bottom - 10, chart.log);
    const path = chart.x.map((x, place) =>
      `${place ? "L" : "M"}${(left + placeX(x)).toFixed(1)} ${(height - bottom - Math.max(0, placeY(Math.max(chart.y[place], least)))).toFixed(1)}`);
    const levels = chart.log ? [1, 1e-1, 1e-2, 1e-3, 1e-4].map((share) => share * most) : [0, most / 2, most];
    return draw("svg", { viewBox: `0 0 ${width} ${height}` },
      ...axes(width, height, left, bottom,
        { title: chart.axis, ticks: ticks(chart.x[0], chart.x[chart.x.length - 1], placeX) },
        { title: "density", ticks: levels.map((level) => [short(Number(level.toPrecision(1))), placeY(level)]) }),
      draw("path", { d: path.join(""), class: "curve" }));
  }

  function bars(chart) {
    const largest = Math.max(...chart.bars.map((pair) => Math.abs(pair[1])), 0);
    return make("table", { class: "bars" }, chart.bars.map(([name, value]) => make("tr", {},
      make("th", {}, name), make("td", {}, bar(value, largest)), make("td", { class: "number" }, short(value)))));
  }

  function charts(section, root) {
    const kinds = { histogram, line, bars };
    root.append(make("div", { class: "charts" }, section.charts.map((chart) => make("figure", { class: "chart" },
      make("h3", {}, chart.title), kinds[chart.kind](chart),
      chart.caption ? make("figcaption", {}, chart.caption) : null))));
    return {};
  }

  // ---- certificate and tables ------------------------------------------------------------------------------------------

  function certificate(section, root) {
    root.append(
      make("ul", { class: "sentences" }, section.sentences.map(({ text, tone }) => make("li", { class: tone }, text))),
      make("details", {}, make("summary", {}, "Everything that is known"),
        make("table", { class: "known" }, section.facts.map(([name, value]) =>
          make("tr", {}, make("th", {}, name), make("td", {}, value))))));
    return {};
  }

  function table(section, root) {
    for (const part of section.tables) {
      root.append(make("h3", {}, part.title), make("table", { class: "plain" },
        make("thead", {}, make("tr", {}, part.columns.map((name) => make("th", {}, name)))),
        make("tbody", {}, part.rows.map((row) => make("tr", {}, row.map((cell) =>
          make("td", { class: typeof cell === "number" ? "number" : null }, short(cell))))))));
    }
    return {};
  }

  // ---- the page --------------------------------------------------------------------------------------------------------

  const kinds = { queries, ranking, map, charts, certificate, table };
  const head = document.getElementById("head");
  const main = document.getElementById("main");
  const details = document.getElementById("details");
  const parts = new Map();
  const built = new Map();

  function build(id) {
    if (!built.has(id)) {
      const { section, root } = parts.get(id);
      built.set(id, kinds[section.kind](section, root));
    }
    return built.get(id);
  }

  function open(id) {
    for (const [name, { root }] of parts) root.hidden = name !== id;
    for (const tab of head.querySelectorAll("nav a")) tab.classList.toggle("here", tab.hash === `#${id}`);
    return build(id);
  }

  function showDetails(key) {
    const example = examples[key];
    const found = [...parts.keys()].flatMap((id) => {
      const { mentions } = build(id);
      return mentions ? mentions(key) : [];
    });
    const heading = example ? example.name : key.replace("train-", "training example ");
    details.replaceChildren(...[
      make("button", { class: "close", onclick: () => details.close(), "aria-label": "close" }, "×"),
      make("h2", {}, heading),
      example && example.label !== undefined ? make("p", {}, "label ", chip(example.label)) : null,
      example ? showItem(key) : null,
      found.length ? make("h3", {}, "Where it appears") : null,
      make("ul", {}, found)].filter(Boolean));
    if (!details.open) details.showModal();
  }

  function route() {
    let wanted = location.hash.slice(1);
    try { wanted = decodeURIComponent(wanted); } catch { /* a fragment that is no escape sequence */ }
    const current = [...parts].find(([, part]) => !part.root.hidden);
    if (/^train-\d+$/.test(wanted)) {
      if (!current) open(data.sections[0].id);
      showDetails(wanted);
      return;
    }
    if (details.open) details.close();
    if (/^query-/.test(wanted)) {
      for (const [id, { section }] of parts) {
        if (section.kind === "queries" && examples[wanted] && build(id).focus(wanted)) { open(id); return; }
      }
      open(data.sections[0].id);
      return;
    }
    const id = parts.has(wanted) ? wanted : data.sections[0].id;
    const section = open(id);
    if (section.release) section.release();
  }

  document.title = data.title;
  head.append(make("h1", {}, data.title), make("p", { class: "lead" }, data.lead),
    ...data.notes.map((note) => make("p", { class: "note" }, note)));
  const tabs = make("nav");
  for (const section of data.sections) {
    tabs.append(make("a", { href: `#${section.id}` }, section.title));
    const root = make("section", { class: `part ${section.kind}-part`, id: `part-${section.id}`, hidden: true });
    if (section.lead) root.append(make("p", { class: "lead" }, section.lead));
    parts.set(section.id, { section, root });
    main.append(root);
  }
  head.append(tabs);
  details.addEventListener("click", (event) => { if (event.target === details) details.close(); });
  details.addEventListener("close", () => {
    if (!/^#train-/.test(location.hash)) return;
    const current = [...parts].find(([, part]) => !part.root.hidden);
    history.replaceState(null, "", `#${current ? current[0] : ""}`);
  });
  addEventListener("hashchange", route);
  route();
})();
