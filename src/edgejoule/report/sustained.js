// The panels of a sustained run: one figure, one axis of time, the steady state shaded. Reads the JSON in #data; asks nothing of any network.
(function () {
  "use strict";
  const { css, data } = page;
  const digits = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toPrecision(3));
  function draw(plot) {
    const narrow = plot.clientWidth < 480, count = data.panels.length, gap = 46 / plot.clientHeight;
    const { font, ink, axis, layout: base } = page.look(narrow), accent = css("--accent");
    const height = (1 - gap * (count - 1)) / count;
    const layout = {
      ...base, margin: { l: narrow ? 40 : 52, r: 14, t: 30, b: 46 }, showlegend: false, hovermode: "x unified", annotations: [], shapes: [],
      xaxis: { ...axis, range: [0, data.end], anchor: "y" + (count > 1 ? count : ""), hoverformat: ".1f",
        title: { text: "Time (" + data.unit + ")", font: { size: font }, standoff: 8 } },
    };
    const traces = data.panels.map((panel, i) => {
      const name = i ? String(i + 1) : "", top = 1 - i * (height + gap), color = css("--c" + panel.color);
      const known = panel.values.filter((value) => value !== null), most = Math.max(...known), least = Math.min(...known);
      const room = Math.max((most - (panel.zero ? 0 : least)) * 0.12, most * 0.01, 1e-9);
      layout["yaxis" + name] = { ...axis, domain: [Math.max(0, top - height), top], nticks: 5, hoverformat: ".4~g",
        range: panel.zero ? [0, most + room] : [Math.floor(least - room), Math.ceil(most + room)] };
      layout.annotations.push({ xref: "paper", yref: "paper", x: 0, y: top, xanchor: "left", yanchor: "bottom", showarrow: false,
        text: "<b>" + panel.title + "</b>  " + panel.unit, font: { size: font, color: ink } });
      if (panel.steady !== null && data.steady !== null) {
        layout.shapes.push({ type: "line", xref: "x", yref: "y" + name, x0: data.steady, x1: data.end, y0: panel.steady, y1: panel.steady,
          line: { color: ink, width: 1.2, dash: "dot" } });
        layout.annotations.push({ xref: "x", yref: "y" + name, x: data.end, y: panel.steady, xanchor: "right", yanchor: "top", yshift: -8, showarrow: false,
          text: digits(panel.steady) + " " + panel.unit, font: { size: font, color: ink } });
      }
      if (data.steady !== null)
        layout.shapes.push({ type: "rect", layer: "below", xref: "x", yref: "paper", x0: data.steady, x1: data.end, y0: Math.max(0, top - height), y1: top,
          fillcolor: accent, opacity: 0.1, line: { width: 0 } });
      return { x: data.times, y: panel.values, yaxis: "y" + name, mode: "lines", name: panel.title, line: { color, width: 2, shape: "hvh" }, connectgaps: false,
        hovertemplate: "%{y} " + panel.unit };
    });
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", data.panels.map((panel) => panel.title).join(", ") + " over time; the figures above hold the means");
    page.show(plot, traces, layout, narrow);
  }
  page.everyPlot(draw);
}());
