// Elements, and numbers as text.

const SVG = document.getElementById("svg-namespace").namespaceURI;

/** An HTML element; text goes in as text, never as markup. */
function html(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function format(value, percent = false) {
  if (value === null || value === undefined) return "–";
  if (percent) return `${Number((100 * value).toPrecision(3))}%`;
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return Number(value.toPrecision(2)).toExponential();
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}
