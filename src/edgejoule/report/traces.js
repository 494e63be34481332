// A power trace: its lines, and each inference that was found shaded. Reads the JSON in #data; asks nothing of any network.
(function () {
  "use strict";
  const { css, data } = page;
  function draw(plot) {
    const narrow = plot.clientWidth < 480, { axis, layout: base } = page.look(narrow);
    const colours = { power: css("--c0"), background: css("--c2"), threshold: css("--c1") };
    const shapes = data.segments.map(([from, to]) => ({ type: "rect", layer: "below", xref: "x", yref: "paper", x0: from, x1: to,
      y0: 0, y1: 1, fillcolor: css("--accent"), opacity: 0.15, line: { width: 0 } }));
    const lines = data.lines.map(({ name, x, y }) => ({ type: "scatter", mode: "lines", name, x, y,
      line: { color: colours[name], width: name === "power" ? 1 : 1.5, dash: name === "threshold" ? "dot" : "solid" } }));
    const layout = { ...base, shapes, margin: { l: narrow ? 44 : 60, r: 14, t: 10, b: 50 }, legend: { orientation: "h", y: 1.06 },
      xaxis: { ...axis, title: { text: "Time from the first sample (s)" } }, yaxis: { ...axis, title: { text: "Power (W)" } } };
    page.show(plot, lines, layout, narrow);
  }
  page.everyPlot(draw);
}());
