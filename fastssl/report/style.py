"""The page's style sheet: one column of cards, light and dark from the reader's system, readable from a phone to a wide screen."""

from fastssl.report.figures import DARK, LIGHT


def _palette(colours: tuple[str, ...]) -> str:
    return "".join(f"--m{k}:{c};" for k, c in enumerate(colours))


_LIGHT = _palette(LIGHT) + "--page:#f5f6f8;--card:#ffffff;--ink:#1b1f27;--soft:#5c6472;--grid:#e3e6ec;--line:#d9dde4;--mark:#fff3d6;--bad:#b3261e;"
_DARK = _palette(DARK) + "--page:#12151b;--card:#1b1f27;--ink:#e8eaef;--soft:#a0a8b6;--grid:#303641;--line:#363d49;--mark:#4a3b12;--bad:#ff8a80;"

CSS = (
    f":root{{color-scheme:light dark;{_LIGHT}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    f"@media print{{:root{{{_LIGHT}--page:#ffffff}}}}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:27px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:19px;margin:36px 0 4px;letter-spacing:-.005em}
p{margin:4px 0 12px;max-width:80ch}
.soft,caption,.note{color:var(--soft)}
.note{font-size:13.5px}
nav{margin:12px 0 20px;font-size:14px;display:flex;flex-wrap:wrap;gap:4px 16px}
nav a,a{color:inherit;text-decoration-color:var(--soft);text-underline-offset:3px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,225px),1fr));gap:12px;margin:14px 0}
.cards .card{display:flex;flex-direction:column;gap:1px}
.cards h3{margin:0;font-size:14.5px;display:flex;align-items:center;gap:8px;overflow-wrap:anywhere}
.big{font-size:32px;font-weight:650;line-height:1.2;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.big small{font-size:16px;font-weight:450;color:var(--soft);letter-spacing:0}
.swatch{width:28px;height:14px;flex:none}
.legend{display:flex;flex-wrap:wrap;gap:4px 20px;margin:8px 0;font-size:14px}
.legend span{display:inline-flex;align-items:center;gap:7px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:12px}
.plots.wide{grid-template-columns:1fr}
figure{margin:0}
figure.plot{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 12px}
figure.plot svg{display:block;width:100%;height:auto}
figure.sheet img{max-width:100%;height:auto;display:block;border-radius:6px;image-rendering:auto}
figcaption{font-size:13.5px;color:var(--soft);margin:0 0 6px}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;margin:8px 0}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
tbody th{white-space:nowrap}
th,td{padding:6px 9px;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead tr:first-child>*{border-top:0}
th{font-weight:600}
thead th{color:var(--soft);font-size:13px;vertical-align:bottom}
th.l,td.l{text-align:left}
#environment th{width:1%;vertical-align:top}
td.wrap{white-space:normal;overflow-wrap:anywhere;min-width:150px}
tbody th{text-align:left;font-weight:550}
tbody th .swatch{vertical-align:-2px;margin-right:8px}
td.top{font-weight:700}
tr.mean{background:color-mix(in srgb,var(--grid) 45%,transparent)}
tr.mean small{font-weight:400}
.state{font-size:12px;font-weight:450;color:var(--bad);border:1px solid currentColor;margin-left:4px;border-radius:99px;padding:1px 8px}
mark{background:var(--mark);color:inherit;padding:0 3px;border-radius:3px}
code,pre{font:13px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{margin:8px 0;padding:10px 12px;background:var(--card);border:1px solid var(--line);border-radius:10px;overflow-x:auto}
details{margin:8px 0}
summary{cursor:pointer;font-weight:550}
footer{margin-top:40px;font-size:13px;color:var(--soft)}
.plots.wide figure.plot{overflow-x:auto}
@media (max-width:600px){.plots.wide figure.plot svg{width:780px}}
@media (max-width:600px){main{padding:18px 12px 40px}h1{font-size:23px}th,td{padding:6px 8px}.card,figure.plot{padding:9px 10px}}
@media print{body{font-size:12px}.card,figure,.scroll,tr{break-inside:avoid}nav{display:none}}
"""
)
