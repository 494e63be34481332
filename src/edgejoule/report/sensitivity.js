// A plot for each pass: points lost by layer as dots, below them the MACs saved as bars. Reads the JSON in #data; asks nothing of any network.
(function () {
  "use strict";
  const { css, plain, data: { passes } } = page;
  const every = passes.flat(), drops = every.flatMap((bar) => bar.drop).filter((value) => value !== null);
  const least = Math.min(0, ...drops), most = Math.max(0, ...drops), room = Math.max((most - least) * 0.08, 0.05);
  const macs = Math.max(...every.map((bar) => bar.macs), 0.1), saved = [Math.min(0, ...every.map((bar) => bar.macs)) * 1.1, macs * 1.1];
  function draw(plot) {
    const bars = passes[Number(plot.dataset.pass)], width = plot.clientWidth, height = plot.clientHeight, narrow = width < 480;
    const { font, ink, soft, axis, layout: base } = page.look(narrow), left = narrow ? 44 : 56, count = bars.length;
    // Names of layers: as many as there is room for, upright where they are longer than a layer is wide.
    const step = Math.max(1, Math.ceil(count * font * 1.25 / (width - left - 14)));
    const places = bars.map((_, i) => i).filter((i) => i % step === 0);
    const names = places.map((i) => (bars[i].layer.length > 24 ? "…" + bars[i].layer.slice(-23) : bars[i].layer));
    const longest = Math.max(...names.map((name) => name.length)) * font * 0.53, upright = longest + 12 > (width - left) / places.length;
    const foot = (upright ? Math.min(longest, height * 0.4) : font * 1.4) + 14, gap = 38 / (height - foot - 30);
    const zero = { zeroline: true, zerolinecolor: soft, zerolinewidth: 1 };
    const hover = bars.map((bar) => "<b>" + plain(bar.hover[0]) + "</b><br>" + bar.hover.slice(1).map(plain).join("<br>"));
    const x = bars.map((_, i) => i), color = css("--c1");
    const title = (text, y) => ({ xref: "paper", yref: "paper", x: 0, y, xanchor: "left", yanchor: "bottom", showarrow: false, text, font: { size: font, color: ink } });
    const traces = [
      { x, y: bars.map((bar) => bar.drop[0]), mode: "markers", marker: { color, size: 8 }, hovertext: hover, hoverinfo: "text",
        error_y: { type: "data", symmetric: false, thickness: 2, width: 0, color,
          array: bars.map((bar) => (bar.drop[2] === null ? 0 : bar.drop[2] - bar.drop[0])),
          arrayminus: bars.map((bar) => (bar.drop[1] === null ? 0 : bar.drop[0] - bar.drop[1])) } },
      { x, y: bars.map((bar) => bar.macs), yaxis: "y2", type: "bar", marker: { color: css("--c0") }, hovertext: hover, hoverinfo: "text" },
    ];
    const split = 0.36, layout = {
      ...base, margin: { l: left, r: 14, t: 30, b: foot }, showlegend: false, bargap: 0.35,
      annotations: [title("<b>Lost</b>  points", 1), title("<b>MACs saved</b>  % of the network's", split - gap)],
      xaxis: { ...axis, range: [-0.6, count - 0.4], anchor: "y2", tickvals: places, ticktext: names.map(plain), tickangle: upright ? -90 : 0 },
      yaxis: { ...axis, ...zero, domain: [split, 1], range: [least - room, most + room], nticks: 7 },
      yaxis2: { ...axis, ...zero, domain: [0, split - gap], range: saved, nticks: 4 },
    };
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", "Points lost and MACs saved by layer; the figures below hold the same numbers");
    page.show(plot, traces, layout, narrow);
  }
  page.everyPlot(draw);
}());
