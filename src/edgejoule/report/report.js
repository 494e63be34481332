// Sorting and plots of the report. Reads the JSON in #data; asks nothing of any network.
(function () {
  "use strict";
  const { css, plain, data } = page;
  const UNITS = { energy: ["Energy per image", "mJ"], latency: ["Median latency", "ms"] };
  const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "cross", "star"];

  // ---- tables: a click or Enter on a heading sorts, again turns the order round; cells without a value stay last
  function compare(a, b) {
    const x = Number(a), y = Number(b);
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  }
  function sort(th) {
    const table = th.closest("table"), body = table.tBodies[0], index = th.cellIndex;
    const down = th.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach((other) => other.setAttribute("aria-sort", "none"));
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = Array.from(body.rows), key = (row) => row.cells[index].dataset.v;
    const known = rows.filter((row) => key(row) !== undefined), rest = rows.filter((row) => key(row) === undefined);
    known.sort((a, b) => compare(key(a), key(b)) * (down ? -1 : 1));
    known.concat(rest).forEach((row) => body.appendChild(row));
  }
  document.querySelectorAll("table.sortable th button").forEach((button) =>
    button.addEventListener("click", () => sort(button.parentElement)));

  // ---- plots
  function ticks(low, high) {
    const steps = (wanted) => {
      const found = [];
      for (let decade = Math.floor(Math.log10(low)) - 1; decade <= Math.log10(high) + 1; decade++)
        for (const step of wanted) {
          const value = Number((step * 10 ** decade).toPrecision(2));
          if (value >= low && value <= high) found.push(value);
        }
      return found;
    };
    const coarse = steps([1, 2, 5]);
    return coarse.length > 3 ? coarse : steps([1, 1.5, 2, 3, 4, 6, 8]);
  }
  function extent(rows, cost) {
    const all = rows.flatMap((row) => row[cost]).filter((value) => value !== null && value > 0);
    return [Math.min(...all), Math.max(...all)];
  }
  // Labels, each model once: the first of eight places beside its dot that covers no dot and no label; else none (hover still tells).
  function place(rows, x, y, size, font) {
    const taken = rows.map((row) => [x(row) - 7, y(row) - 7, x(row) + 7, y(row) + 7]);
    rows.filter((row) => row.bounds).forEach((row) => taken.push([x(row) - 1, y(row, 2), x(row) + 1, y(row, 1)]));
    const free = (box) => box[0] > 2 && box[2] < size[0] - 2 && box[1] > 2 && box[3] < size[1] - 2 &&
      taken.every((other) => box[2] < other[0] || box[0] > other[2] || box[3] < other[1] || box[1] > other[3]);
    const order = rows.slice().sort((a, b) => (b.best - a.best) || (b.isFront - a.isFront));
    const labels = [], named = new Set();
    for (const row of order) {
      const model = row.name + " " + row.top1.toFixed(1);
      if (named.has(model)) continue;
      const text = row.name.length > 28 ? row.name.slice(0, 27) + "…" : row.name;
      const w = text.length * font * 0.58, h = font * 1.3;
      const spots = [[0, -h], [0, h], [w / 2 + 11, 0], [-w / 2 - 11, 0], [w / 2 + 6, -h * .8], [-w / 2 - 6, -h * .8], [w / 2 + 6, h * .8], [-w / 2 - 6, h * .8]];
      for (const [dx, dy] of spots) {
        const cx = x(row) + dx, cy = y(row) + dy, box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2];
        if (!free(box)) continue;
        taken.push(box);
        labels.push({ row, text, dx, dy });
        named.add(model);
        break;
      }
    }
    return labels;
  }
  function draw(plot) {
    const ranking = data.rankings[Number(plot.dataset.ranking)], cost = plot.dataset.cost;
    const rows = ranking.rows.filter((row) => row[cost]).map((row) => ({ ...row, isFront: row.front[cost] }));
    const [title, unit] = UNITS[cost], width = plot.clientWidth, height = plot.clientHeight, narrow = width < 480;
    const { font, ink, soft, line, axis, layout: base } = page.look(narrow), margin = { l: narrow ? 44 : 54, r: 12, t: 34, b: 50 };
    const [least, most] = extent(rows, cost), log = most / least > 4;
    const at = (value) => (log ? Math.log10(value) : value);
    const pad = Math.max((at(most) - at(least)) * 0.13, log ? 0.05 : most * 0.05);
    const xs = [at(least) - pad, at(most) + pad];
    const tops = rows.flatMap((row) => (row.bounds ? [row.top1, row.bounds[1], row.bounds[2]] : [row.top1])), rise = Math.max(0.5, (Math.max(...tops) - Math.min(...tops)) * 0.18);
    const ys = [Math.min(...tops) - rise, Math.max(...tops) + rise];
    const size = [width - margin.l - margin.r, height - margin.t - margin.b];
    const px = (row) => (at(row[cost][0]) - xs[0]) / (xs[1] - xs[0]) * size[0];
    const py = (row, bound) => (ys[1] - (bound ? row.bounds[bound] : row.top1)) / (ys[1] - ys[0]) * size[1];
    const backends = Array.from(new Set(rows.map((row) => row.backend)));
    const front = rows.filter((row) => row.isFront).sort((a, b) => a[cost][0] - b[cost][0]);
    const traces = [{
      x: front.map((row) => row[cost][0]), y: front.map((row) => row.top1), mode: "lines", name: "front",
      line: { shape: "hv", dash: "dot", width: 1.5, color: soft }, hoverinfo: "skip",
    }];
    // From each network to what a recipe made of it, where both are there and an arrow has room between them.
    rows.forEach((row) => {
      const plain = rows.find((other) => row.own !== "" && other.label === row.own);
      if (plain && Math.hypot(px(row) - px(plain), py(row) - py(plain)) > 20) traces.push({
        x: [plain[cost][0], row[cost][0]], y: [plain.top1, row.top1], mode: "lines+markers", hoverinfo: "skip", showlegend: false,
        line: { width: 1.2, color: soft }, marker: { symbol: "arrow", angleref: "previous", standoff: 6, size: [0, 10], color: soft }, opacity: 0.75,
      });
    });
    backends.forEach((backend, i) => {
      const own = rows.filter((row) => row.backend === backend), color = css("--c" + (i % 6));
      traces.push({
        x: own.map((row) => row[cost][0]), y: own.map((row) => row.top1), mode: "markers", name: plain(backend || "models"),
        showlegend: backends.length > 1 || backend !== "",
        error_x: {
          type: "data", symmetric: false, thickness: 2, width: 0, color,
          array: own.map((row) => (row[cost][2] === null ? 0 : row[cost][2] - row[cost][0])),
          arrayminus: own.map((row) => (row[cost][1] === null ? 0 : row[cost][0] - row[cost][1])),
        },
        ...(own.some((row) => row.bounds) ? { error_y: {
          type: "data", symmetric: false, thickness: 2, width: 0, color,
          array: own.map((row) => (row.bounds ? row.bounds[2] - row.top1 : 0)),
          arrayminus: own.map((row) => (row.bounds ? row.top1 - row.bounds[1] : 0)),
        } } : {}),
        marker: {
          color, symbol: SYMBOLS[i % 6], size: own.map((row) => (row.best ? 14 : 9)),
          opacity: 1, line: { width: own.map((row) => (row.isFront ? 1.5 : 0)), color: ink },
        },
        hovertext: own.map((row) => "<b>" + plain(row.name) + "</b>" + (row.backend ? " @ " + plain(row.backend) : "") +
          "<br>" + row.hover.map(plain).join("<br>")),
        hoverinfo: "text",
      });
    });
    const notes = place(rows, px, py, size, font).map(({ row, text, dx, dy }) => ({
      x: at(row[cost][0]), y: row.top1, xshift: dx, yshift: -dy, text: plain(text), showarrow: false,
      xanchor: "center", yanchor: "middle", font: { size: font, color: row.best ? ink : soft },
    }));
    const shown = log ? ticks(10 ** xs[0], 10 ** xs[1]) : null;
    const layout = {
      ...base, margin, annotations: notes,
      xaxis: { ...axis, type: log ? "log" : "linear", range: xs,
        title: { text: title + " (" + unit + (log ? ", log scale)" : ")"), font: { size: font }, standoff: 10 },
        ...(shown ? { tickvals: shown, ticktext: shown.map(String) } : {}) },
      yaxis: { ...axis, range: ys, title: { text: ranking.accuracy, font: { size: font } } },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.01, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    };
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", "Accuracy against " + cost + " of " + rows.length + " rows; the ranking table holds the same figures");
    page.show(plot, traces, layout, narrow);
  }
  page.everyPlot(draw);
}());
