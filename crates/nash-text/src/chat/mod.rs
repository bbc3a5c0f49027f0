//! Chat templates: a conversation becomes the text a model was trained on.
//!
//! A template is a Jinja program that comes with the model, and is rendered as Hugging Face `transformers` renders
//! it: blocks trimmed on both sides, Python's string and dictionary methods, `tojson`, `raise_exception`,
//! `strftime_now`, and `{% generation %}` blocks rendered as if they were not there. Templates are programs from
//! the internet: they get a budget of steps and memory ([`FUEL`]), and no access to anything but their arguments.

mod clock;
mod json;

use crate::folder::token_text;
use crate::{TextError, Tokenizer};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Steps a rendering may take; a step may also create 64 bytes. Templates in use take a few thousand.
pub const FUEL: u64 = 10_000_000;

/// ChatML, the most common template; what a model gets that knows its marks but brings no template.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + \
                      '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const CHATML_MARKS: [&str; 2] = ["<|im_start|>", "<|im_end|>"];
const NAME: &str = "chat_template";

/// One turn of a conversation. Templates may look at more fields (tool calls, reasoning); pass any serializable type
/// to [`ChatTemplate::render`] then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user", "assistant", or what else the model knows.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// What a template may be told besides the messages.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions {
    /// Ends with the opening of the assistant's turn, so that the model answers.
    pub add_generation_prompt: bool,
    /// JSON schemas of the tools the model may call.
    pub tools: Option<serde_json::Value>,
    /// Further variables by name, such as `enable_thinking`; they override the others.
    pub variables: BTreeMap<String, serde_json::Value>,
    /// The time that `strftime_now` formats, in UTC; the present by default.
    pub now: Option<SystemTime>,
}

impl RenderOptions {
    /// Options for asking the model to answer.
    pub fn answer() -> Self {
        Self {
            add_generation_prompt: true,
            ..Self::default()
        }
    }
}

/// A compiled chat template. Made by [`Tokenizer::chat_template`] or [`ChatTemplate::new`].
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    origin: PathBuf,
    tokens: BTreeMap<String, String>,
    fallback: bool,
}

/// The template of a tokenizer's model, or ChatML if the vocabulary has its marks.
pub(crate) fn of_tokenizer(tokenizer: &Tokenizer) -> Result<ChatTemplate, TextError> {
    let roles = ["bos_token", "eos_token", "unk_token", "pad_token"];
    let text = |role: &&str| {
        Some((
            (*role).to_owned(),
            token_text(tokenizer.config(), role)?.to_owned(),
        ))
    };
    let tokens = roles.iter().filter_map(text).collect();
    if let Some(source) = default_source(tokenizer.config().get(NAME)) {
        return ChatTemplate::compile(tokenizer.origin(), source, tokens, false);
    }
    let speaks_chatml = CHATML_MARKS.iter().all(|mark| {
        tokenizer
            .token_to_id(mark)
            .is_some_and(|id| tokenizer.is_special(id))
    });
    if speaks_chatml {
        return ChatTemplate::compile(tokenizer.origin(), CHATML, tokens, true);
    }
    Err(TextError::NoChatTemplate {
        file: tokenizer.origin().to_owned(),
    })
}

/// A template, or the one called "default" of several.
fn default_source(value: Option<&serde_json::Value>) -> Option<&str> {
    match value? {
        serde_json::Value::Array(named) => {
            let is_default =
                |t: &&serde_json::Value| t.get("name").and_then(|n| n.as_str()) == Some("default");
            named
                .iter()
                .find(is_default)
                .or(named.first())?
                .get("template")?
                .as_str()
        }
        one => one.as_str(),
    }
}

impl ChatTemplate {
    /// Compiles a template given by hand; `origin` is named in errors.
    ///
    /// # Errors
    /// [`TextError::Template`] with the line of the mistake.
    pub fn new(origin: impl AsRef<Path>, source: &str) -> Result<Self, TextError> {
        Self::compile(origin.as_ref(), source, BTreeMap::new(), false)
    }

    /// ChatML, for a model whose template is unknown.
    ///
    /// # Errors
    /// None in practice: the template is a constant.
    pub fn chatml() -> Result<Self, TextError> {
        Self::compile(Path::new("ChatML"), CHATML, BTreeMap::new(), true)
    }

    /// This template with a value for one of the token variables, such as `bos_token`.
    pub fn with_token(mut self, variable: impl Into<String>, text: impl Into<String>) -> Self {
        self.tokens.insert(variable.into(), text.into());
        self
    }

    /// Whether this is ChatML put in because the model brought no template; say so to the user.
    pub fn is_fallback(&self) -> bool {
        self.fallback
    }

    fn compile(
        origin: &Path,
        source: &str,
        tokens: BTreeMap<String, String>,
        fallback: bool,
    ) -> Result<Self, TextError> {
        let failed = |e: minijinja::Error| TextError::Template {
            file: origin.to_owned(),
            message: explain(&e),
        };
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(failed)?;
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", json::tojson);
        environment.add_test("iterable", |value: &Value| {
            use minijinja::value::ValueKind::{Iterable, Map, Seq, String, Undefined};
            matches!(value.kind(), Iterable | Map | Seq | String | Undefined) // as in Python; minijinja counts none in
        });
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, minijinja::Error> {
                Err(minijinja::Error::new(
                    ErrorKind::InvalidOperation,
                    format!("{RAISED}{message}"),
                ))
            },
        );
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(failed)?;
        Ok(Self {
            environment,
            origin: origin.to_owned(),
            tokens,
            fallback,
        })
    }

    /// The conversation as text, special tokens written out: give it to [`Tokenizer::encode_prompt`] with
    /// `add_special` false.
    ///
    /// # Errors
    /// [`TextError::Template`] with the template's own words when it refuses the conversation (roles out of order,
    /// say), or the line that failed.
    pub fn render<M: Serialize>(&self, messages: &[M], options: &RenderOptions) -> Result<String, TextError> {
        let failed = |e: minijinja::Error| TextError::Template {
            file: self.origin.clone(),
            message: explain(&e),
        };
        let mut variables: BTreeMap<String, Value> = self
            .tokens
            .iter()
            .map(|(name, text)| (name.clone(), Value::from(text.clone())))
            .collect();
        variables.insert("messages".into(), Value::from(Serde(messages)));
        variables.insert("tools".into(), Value::from(Serde(&options.tools)));
        variables.insert("documents".into(), Value::from(()));
        variables.insert(
            "add_generation_prompt".into(),
            Value::from(options.add_generation_prompt),
        );
        let now = options.now.unwrap_or_else(SystemTime::now);
        variables.insert(
            "strftime_now".into(),
            Value::from_function(move |format: String| clock::strftime(now, &format)),
        );
        for (name, value) in &options.variables {
            variables.insert(name.clone(), Value::from(Serde(value)));
        }
        let template = self.environment.get_template(NAME).map_err(failed)?;
        template.render(Value::from_pairs(variables)).map_err(failed)
    }
}

/// Marks the template's own message among the engine's.
const RAISED: &str = "\u{1}";

/// The engine's message, or the template's own without decoration.
fn explain(error: &minijinja::Error) -> String {
    let detail = error.detail().unwrap_or_default();
    if let Some(raised) = detail.strip_prefix(RAISED) {
        return format!("it says: {raised}");
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return "it does not end within the limits; the template is damaged or hostile".into();
    }
    let line = error
        .line()
        .map(|line| format!("line {line}: "))
        .unwrap_or_default();
    let detail = if detail.is_empty() {
        error.kind().to_string()
    } else {
        detail.to_owned()
    };
    format!("{line}{detail}")
}

/// `{% generation %}` marks what a model is trained on; for rendering it is a block without effect.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        let inner = &tag[2..tag.len() - 2];
        let name = inner.trim_matches(['-', '+']).trim();
        match name {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String, TextError> {
        ChatTemplate::new("model", source)?.render(messages, &RenderOptions::answer())
    }

    #[test]
    fn generation_blocks_are_transparent() {
        let source = "a\n{%- generation -%}\n b {{ 1 }}\n{%- endgeneration %}\nc{% if true %}d{% endif %}";
        assert_eq!(render(source, &[]).unwrap(), "ab 1cd");
        assert_eq!(
            without_generation_tags("{% set generation = 1 %}{% x"),
            "{% set generation = 1 %}{% x"
        );
    }

    #[test]
    fn a_refusal_is_passed_on_in_the_templates_words() {
        let error = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "model: the chat template failed: it says: roles must alternate"
        );
    }

    #[test]
    fn mistakes_name_the_line() {
        let error = render(
            "line\n{{ messages[0].content | nonsense }}",
            &[Message::new("user", "x")],
        )
        .unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
        assert!(ChatTemplate::new("model", "{% if %}").is_err());
    }

    #[test]
    fn endless_and_greedy_templates_are_stopped() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}";
        for source in [
            endless,
            "{{ 'x' * 9999999999 }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        ] {
            assert!(render(source, &[]).is_err(), "{source}");
        }
    }

    #[test]
    fn strftime_now_uses_the_given_time() {
        let options = RenderOptions {
            now: Some(SystemTime::UNIX_EPOCH),
            ..RenderOptions::default()
        };
        let template = ChatTemplate::new("model", "{{ strftime_now('%d %b %Y') }}").unwrap();
        assert_eq!(template.render::<Message>(&[], &options).unwrap(), "01 Jan 1970");
    }

    #[test]
    fn chatml_is_what_it_should_be() {
        let text = ChatTemplate::chatml().unwrap();
        assert!(text.is_fallback());
        let text = text
            .render(&[Message::new("user", "Hi")], &RenderOptions::answer())
            .unwrap();
        assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn several_templates_have_a_default() {
        let named =
            serde_json::json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
        assert_eq!(default_source(Some(&named)), Some("d"));
        assert_eq!(default_source(Some(&"x".into())), Some("x"));
        assert_eq!(default_source(None), None);
    }
}
