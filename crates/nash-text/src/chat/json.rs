//! `tojson` as `transformers` defines it: Python's `json.dumps` without ASCII or HTML escapes.

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize as _;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use std::io;

/// The filter; takes `indent`, `separators`, `sort_keys` and `ensure_ascii`.
pub(crate) fn tojson(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let indent = indent.or(options.get("indent")?);
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let failed = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, format!("no JSON: {e}"));
    let mut json = serde_json::to_value(value).map_err(failed)?;
    if sort_keys == Some(true) {
        json.sort_all_objects();
    }
    let mut out = Vec::new();
    match (indent, separators) {
        (Some(width), _) => {
            let indent = " ".repeat(width.min(16));
            let pretty = PrettyFormatter::with_indent(indent.as_bytes());
            json.serialize(&mut Serializer::with_formatter(&mut out, pretty))
                .map_err(failed)?;
        }
        (None, separators) => {
            let mut given = separators.into_iter().flatten();
            let item = given.next().unwrap_or_else(|| ", ".into());
            let key = given.next().unwrap_or_else(|| ": ".into());
            let spaced = Separated { item, key };
            json.serialize(&mut Serializer::with_formatter(&mut out, spaced))
                .map_err(failed)?;
        }
    }
    let text = String::from_utf8_lossy(&out).into_owned();
    Ok(Value::from(if ensure_ascii == Some(true) {
        escaped(&text)
    } else {
        text
    }))
}

/// Characters beyond ASCII as `\uXXXX`; they occur only inside strings.
fn escaped(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            let mut units = [0; 2];
            out.extend(
                c.encode_utf16(&mut units)
                    .iter()
                    .map(|unit| format!("\\u{unit:04x}")),
            );
        }
    }
    out
}

/// One line, with Python's separators.
struct Separated {
    item: String,
    key: String,
}

impl Formatter for Separated {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(self.item.as_bytes())
        }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(self.item.as_bytes())
        }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, context};

    #[test]
    fn agrees_with_json_dumps() {
        let mut env = Environment::new();
        env.add_filter("tojson", super::tojson);
        let x = serde_json::json!({"b": [1, 2.5, null, true, {}], "a": "<é&'\n>", "c": []});
        let render = |t: &str| {
            env.render_str(
                t,
                context! { x => minijinja::Value::from(minijinja::value::Serde(&x)) },
            )
            .unwrap()
        };
        // json.dumps(x, ensure_ascii=False), and with the options named
        assert_eq!(
            render("{{ x|tojson }}"),
            r#"{"b": [1, 2.5, null, true, {}], "a": "<é&'\n>", "c": []}"#
        );
        assert_eq!(render("{{ x.a|tojson(ensure_ascii=true) }}"), r#""<\u00e9&'\n>""#);
        assert_eq!(
            render("{{ x.b|tojson(separators=(',', ':')) }}"),
            "[1,2.5,null,true,{}]"
        );
        assert_eq!(
            render("{{ x|tojson(indent=2, sort_keys=true) }}"),
            "{\n  \"a\": \"<é&'\\n>\",\n  \"b\": [\n    1,\n    2.5,\n    null,\n    true,\n    {}\n  ],\n  \"c\": []\n}"
        );
    }
}
