// Renders openapi.json: every route, what it takes, and what it answers.

const routes = document.getElementById("routes");

function element(name, text, ...children) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

function resolved(schema, api) {
  if (!schema?.$ref) return schema ?? {};
  return schema.$ref.split("/").slice(1).reduce((place, key) => place?.[key], api) ?? {};
}

function typeOf(schema, api) {
  const known = resolved(schema, api);
  if (known.enum) return known.enum.map((value) => JSON.stringify(value)).join(" or ");
  if ("const" in known) return JSON.stringify(known.const);
  const any = known.anyOf ?? known.oneOf;
  if (any) return any.map((each) => typeOf(each, api)).join(" or ");
  if (known.type === "array") return `list of ${typeOf(known.items, api)}`;
  return known.title && known.properties ? known.title : known.format ?? known.type ?? "anything";
}

const BOUNDS = {
  minimum: "at least", maximum: "at most", minLength: "characters, at least",
  maxLength: "characters, at most", minItems: "members, at least", maxItems: "members, at most",
  pattern: "of the form",
};

function said(schema, api, description) {
  const words = [description ?? resolved(schema, api).description ?? ""];
  for (const each of [schema, ...(schema?.anyOf ?? [])]) {
    for (const [key, name] of Object.entries(BOUNDS)) {
      if (each && key in each) words.push(`${name} ${each[key]}`);
    }
  }
  if (schema?.default !== undefined && schema.default !== null) {
    words.push(`${JSON.stringify(schema.default)} if not given`);
  }
  return words.filter(Boolean).join("; ");
}

function table(headers, rows) {
  const head = element("tr", "", ...headers.map((header) => element("th", header)));
  const lines = rows.map((row) => element("tr", "", ...row.map((cell) => element("td", cell))));
  return element("table", "", element("thead", "", head), element("tbody", "", ...lines));
}

function taken(operation, api) {
  const rows = (operation.parameters ?? []).map((parameter) => [
    parameter.name, parameter.in, typeOf(parameter.schema, api),
    said(parameter.schema, api, parameter.description),
  ]);
  for (const [kind, { schema }] of Object.entries(operation.requestBody?.content ?? {})) {
    const body = resolved(schema, api);
    for (const [name, field] of Object.entries(body.properties ?? {})) {
      const must = body.required?.includes(name) ? ", needed" : "";
      rows.push([name, `${kind}${must}`, typeOf(field, api), said(field, api)]);
    }
  }
  return rows;
}

function examples(operation, api) {
  const contents = Object.values(operation.requestBody?.content ?? {});
  return contents.flatMap(({ schema }) => resolved(schema, api).examples ?? []);
}

function route(path, method, operation, api) {
  const name = element("span", method.toUpperCase());
  name.className = "method";
  const summary = element("summary", "", name, element("code", path));
  const parts = [summary, element("p", operation.description ?? operation.summary ?? "")];
  const rows = taken(operation, api);
  if (rows.length) parts.push(table(["takes", "in", "type", ""], rows));
  for (const example of examples(operation, api)) {
    parts.push(element("pre", JSON.stringify(example, null, 2)));
  }
  const answers = Object.entries(operation.responses).map(([status, answer]) => [
    status, Object.keys(answer.content ?? {}).join(", "), answer.description,
  ]);
  parts.push(table(["answers", "type", ""], answers));
  return element("details", "", ...parts);
}

function render(api) {
  const groups = new Map();
  for (const [path, operations] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      const tag = operation.tags?.[0] ?? "other";
      if (!groups.has(tag)) groups.set(tag, [element("h2", tag)]);
      groups.get(tag).push(route(path, method, operation, api));
    }
  }
  routes.removeAttribute("role");
  routes.replaceChildren(...[...groups.values()].flat());
}

try {
  const answer = await fetch("openapi.json");
  if (!answer.ok) throw new Error(`the service answers ${answer.status}`);
  render(await answer.json());
} catch (error) {
  routes.textContent = `openapi.json cannot be read: ${error.message}. Reload the page.`;
}
