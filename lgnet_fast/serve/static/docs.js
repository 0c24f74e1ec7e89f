// The calls of the API, from /openapi.json.
const theme = matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark";
document.documentElement.dataset.theme = theme;

const make = (name, text, parent) => {
  const element = document.createElement(name);
  if (text) element.textContent = text;
  parent.append(element);
  return element;
};

const fieldsOf = (schema) =>
  Object.entries(schema.properties || {}).map(([name, field]) => ({
    name,
    required: (schema.required || []).includes(name),
    type: field.type || (field.anyOf || []).map((one) => one.type).filter((one) => one !== "null").join(" or "),
    told: [field.description, field.default !== undefined && field.default !== null && `default ${field.default}`]
      .filter(Boolean)
      .join("; "),
  }));

function table(parent, title, rows) {
  if (!rows.length) return;
  make("h3", title, parent);
  const body = make("table", "", parent);
  for (const { name, required, type, told } of rows) {
    const row = make("tr", "", body);
    make("th", name + (required ? " *" : ""), row).scope = "row";
    make("td", type || "", row);
    make("td", told || "", row);
  }
}

const schema = await (await fetch("openapi.json")).json();
const calls = document.querySelector("#calls");
let group = "";
for (const [path, methods] of Object.entries(schema.paths)) {
  for (const [method, call] of Object.entries(methods)) {
    const tag = call.tags?.[0] || "";
    if (tag !== group) make("h2", (group = tag), calls);
    const one = make("details", "", calls);
    const head = make("summary", "", one);
    make("b", method.toUpperCase(), head);
    make("code", path, head);
    make("p", call.description || "", one);
    table(
      one,
      "Path and query",
      (call.parameters || []).map((p) => ({
        name: p.name,
        required: p.required,
        type: p.schema.type || (p.schema.anyOf || [])[0]?.type,
        told: p.description,
      })),
    );
    for (const [type, { schema: body }] of Object.entries(call.requestBody?.content || {})) {
      table(one, `Body: ${type}`, fieldsOf(body));
      if (!body.properties) make("h3", `Body: ${type}`, one);
    }
    table(
      one,
      "Answers",
      Object.entries(call.responses).map(([status, told]) => ({ name: status, told: told.description })),
    );
  }
}
