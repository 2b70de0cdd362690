"""Style and script of a run's report; the page works without the script."""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1c2430;--soft:#59636f;--line:#e1e5ea;--panel:#f6f7f9;
--blue:#22609f;--pale:#8fb4d9;--orange:#b5521b;--green:#18744a;--red:#b42318;--amber:#8a5a00}
@media (prefers-color-scheme:dark){:root{--bg:#14181d;--ink:#e5e8ec;--soft:#9ba6b2;--line:#2d343c;
--panel:#1b2026;--blue:#74b3f2;--pale:#3f6389;--orange:#f09a63;--green:#63c592;--red:#f28b82;
--amber:#e0b050}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main,footer{max-width:1060px;margin:0 auto;padding:0 24px}
header{padding:40px 0 8px}
.kind{margin:0;color:var(--soft);font-size:14px}
.state{display:inline-block;margin-left:8px;padding:1px 10px;border:1px solid;border-radius:99px;
font-weight:600}
.finished{color:var(--green)}.failed{color:var(--red)}.running{color:var(--blue)}
.interrupted,.waiting{color:var(--amber)}
h1{margin:4px 0 8px;font-size:34px;line-height:1.2;font-weight:650;overflow-wrap:anywhere}
h2{margin:0 0 14px;font-size:21px;font-weight:650}
h3{margin:22px 0 8px;font-size:16px;font-weight:650}
.lead{margin:0 0 20px;font-size:18px;max-width:48em;overflow-wrap:anywhere}
section{padding:28px 0;border-top:1px solid var(--line)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin:0 0 24px}
.tiles div{padding:12px 14px;background:var(--panel);border-radius:8px;min-width:0}
.tiles dt{color:var(--soft);font-size:13px}
.tiles dd{margin:2px 0 0;font-size:20px;font-weight:600;overflow-wrap:anywhere;line-height:1.3}
.tiles small{display:block;margin-top:2px;color:var(--soft);font-size:13px;font-weight:400}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));
gap:0 36px;margin:0}
.facts div{display:flex;gap:12px;padding:5px 0;border-bottom:1px solid var(--line);min-width:0}
.facts dt{flex:0 0 128px;color:var(--soft);overflow-wrap:anywhere}
.facts dd{margin:0;min-width:0;overflow-wrap:anywhere}
figure{margin:0}
figcaption{font-weight:600}
.card{padding:14px 16px 8px;border:1px solid var(--line);border-radius:8px;min-width:0}
.card ul:not(.legend){margin:8px 0 4px;padding:0;list-style:none;font-size:15px}
.pair{margin-top:12px;display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
.scroll{overflow-x:auto}
svg{display:block;width:100%;height:auto;font-family:inherit}
svg.chart{min-width:420px;outline-offset:2px}
#loss{min-width:640px}
.grid{stroke:var(--line)}
.axis{stroke:var(--soft)}
.tick,.label,.name{fill:var(--soft);font-size:12px}
.label{font-size:13px}
.name{fill:var(--ink);font-size:13px}
.line{fill:none;stroke-linejoin:round;stroke-linecap:round}
.line.raw{stroke:var(--pale);stroke-width:1}
.line.smooth{stroke:var(--blue);stroke-width:2}
.line.second{stroke:var(--orange);stroke-width:2}
.dot{stroke:var(--bg);stroke-width:1.5}
.dot.smooth,.dot.raw{fill:var(--blue)}.dot.second{fill:var(--orange)}
.mark{stroke-width:1.5}
.mark.published{stroke:var(--green);stroke-dasharray:6 4}
.mark.restart{stroke:var(--soft);stroke-dasharray:2 4}
.note{font-size:12.5px;paint-order:stroke;stroke:var(--bg);stroke-width:4px;stroke-linejoin:round}
.note.published{fill:var(--green);font-weight:600}.note.restart{fill:var(--soft)}
.cross{stroke:var(--red);stroke-width:1.5;fill:none}
.cursor{stroke:var(--soft)}
.bar.lora{fill:var(--blue);fill-opacity:.6}.bar.base{fill:var(--soft);fill-opacity:.35}
.whisker{stroke:var(--ink);stroke-width:1.5;fill:none}
.legend{display:flex;flex-wrap:wrap;gap:2px 20px;margin:0 0 6px;padding:0;list-style:none;
color:var(--soft);font-size:14px}
.key{display:inline-block;width:18px;height:0;margin-right:7px;vertical-align:middle;
border-top:3px solid}
.key.raw{border-color:var(--pale);border-top-width:1.5px}.key.smooth{border-color:var(--blue)}
.key.second{border-color:var(--orange)}
.readout{min-height:1.5em;margin:2px 0 0;color:var(--soft);font-size:14px;
font-variant-numeric:tabular-nums}
.hint,.remark{margin:6px 0 0;color:var(--soft);font-size:14px;max-width:68em}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:18px}
.samples img,.sheet{display:block;width:100%;height:auto;border-radius:6px;background:var(--panel)}
.samples figcaption{margin-top:6px;font-size:15px}
.samples.one{display:block}.samples.one figure{display:none}
.samples.one figure.on{display:flex;flex-direction:column-reverse}
.samples.one figcaption{margin:0 0 6px}
.slider{display:flex;flex-wrap:wrap;align-items:center;gap:6px 16px;margin-bottom:14px;
color:var(--soft);font-size:14px}
.slider[hidden]{display:none}
.slider input[type=range]{flex:1 1 260px;accent-color:var(--blue)}
.prompts{display:grid;gap:2px 10px;margin:8px 0 0;padding:0;list-style:none;color:var(--soft);
font-size:14px;text-align:center;overflow-wrap:anywhere}
.columns-2{grid-template-columns:1fr 1fr}.columns-3{grid-template-columns:repeat(3,1fr)}
.columns-4{grid-template-columns:repeat(4,1fr)}
.caution{margin:16px 0 0;padding:10px 16px;border-left:3px solid var(--amber);
background:var(--panel)}
.caution h3{margin:0 0 2px}.caution ul{margin:0;padding-left:20px}
table{border-collapse:collapse;min-width:min(100%,680px);font-size:15px;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px 5px 0;border-bottom:1px solid var(--line);text-align:right;
white-space:nowrap;vertical-align:top}
th{color:var(--soft);font-weight:500}
th:first-child,td:first-child{text-align:left}
.words{text-align:left;white-space:normal;padding-left:16px;min-width:12em;
overflow-wrap:anywhere}
.remarks{margin:0;padding:0;list-style:none}
.remarks li{padding:8px 14px;margin-bottom:8px;border-left:3px solid var(--amber);
background:var(--panel);overflow-wrap:anywhere}
.remarks li.failure{border-color:var(--red)}
.remarks small{color:var(--soft)}
details{margin:14px 0}
summary{cursor:pointer;color:var(--blue);font-weight:500}
details[open]>summary{margin-bottom:10px}
pre{margin:8px 0 0;padding:14px;background:var(--panel);border-radius:8px;overflow-x:auto;
font:13px/1.45 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,monospace;font-size:.92em}
footer p{margin:0;padding:20px 0 40px;border-top:1px solid var(--line);color:var(--soft);
font-size:14px}
.digest{font:13px/1.6 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
@media (max-width:560px){.prompts{font-size:12px}.facts dt{flex-basis:104px}}
@media print{.slider,.readout{display:none}.samples.one{display:grid}
.samples.one figure{display:flex}section{break-inside:avoid-page}}
"""

SCRIPT = """
(function () {
  'use strict';
  var slider = document.getElementById('sample-step');
  if (slider) {
    var box = document.getElementById('samples'), all = document.getElementById('sample-all');
    var figures = box.querySelectorAll('figure');
    var show = function () {
      figures.forEach(function (figure, place) {
        figure.classList.toggle('on', place === Number(slider.value));
      });
      box.classList.toggle('one', !all.checked);
      slider.disabled = all.checked;
      var caption = figures[slider.value].querySelector('figcaption').textContent;
      slider.setAttribute('aria-valuetext', caption);
    };
    slider.addEventListener('input', show);
    all.addEventListener('change', show);
    slider.closest('.slider').hidden = figures.length < 2;
    show();
  }
  var nearest = function (xs, x) {
    var low = 0, high = xs.length - 1;
    while (high - low > 1) {
      var middle = (low + high) >> 1;
      if (xs[middle] < x) { low = middle; } else { high = middle; }
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  document.querySelectorAll('svg.chart').forEach(function (svg) {
    var frame = JSON.parse(svg.dataset.frame), series = JSON.parse(svg.dataset.series);
    var start = frame[0], end = frame[1], left = frame[2], right = frame[3];
    var cursor = svg.querySelector('.cursor');
    var readout = svg.closest('figure').querySelector('.readout');
    var main = series[0].x, at = main.length - 1;
    var say = function (place) {
      at = Math.max(0, Math.min(main.length - 1, place));
      var x = main[at], px = left + (x - start) / (end - start) * (right - left);
      cursor.setAttribute('x1', px);
      cursor.setAttribute('x2', px);
      cursor.setAttribute('visibility', 'visible');
      var parts = series.map(function (line) {
        var here = nearest(line.x, x), value = line.y[here];
        var text = value === null ? 'not a number' : String(value);
        var other = line.x[here] === x ? '' : ' (step ' + line.x[here].toLocaleString('en') + ')';
        return line.name + ' ' + text + other;
      });
      readout.textContent = 'step ' + x.toLocaleString('en') + ': ' + parts.join(', ');
    };
    var hide = function () {
      cursor.setAttribute('visibility', 'hidden');
      readout.textContent = '';
    };
    svg.addEventListener('pointermove', function (event) {
      var area = svg.getBoundingClientRect();
      var px = (event.clientX - area.left) / area.width * svg.viewBox.baseVal.width;
      say(nearest(main, start + (px - left) / (right - left) * (end - start)));
    });
    svg.addEventListener('pointerleave', hide);
    svg.addEventListener('blur', hide);
    svg.addEventListener('keydown', function (event) {
      var move = {ArrowLeft: -1, ArrowRight: 1, Home: -main.length, End: main.length}[event.key];
      if (move) { say(at + move); event.preventDefault(); }
    });
  });
})();
"""
