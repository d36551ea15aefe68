//! From TOML to a [`Manifest`], or to every fault in it.

use std::collections::BTreeMap;

use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use super::super::{VariableName, cut, one_line};
use super::{Lines, Manifest, Variable, VariableSource};
use crate::error::{Reason, Reasoned as _};
use crate::secret::{EnvironmentName, MAX_VALUE_BYTES, Reference, SecretValue};

const TABLES: [&str; 2] = ["env", "environments"];
const KEYS: [&str; 5] = ["ref", "value", "min_length", "allow_empty", "as"];
const KEYS_OF_REFERENCES: [&str; 3] = ["min_length", "allow_empty", "as"];

type Key<'i> = Spanned<DeString<'i>>;
type Value<'i> = Spanned<DeValue<'i>>;

/// Reads a text of bounded size without a byte order mark.
///
/// # Errors
/// Every fault, in the order of the text. Where the text is no TOML, only those faults: what else would be found in it
/// would follow from them.
pub(super) fn read(text: &str) -> Result<Manifest, Vec<Fault>> {
    let mut reader = Reader { lines: Lines::new(text), faults: Vec::new() };
    let (document, errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        let manifest = reader.document(document.get_ref());
        if reader.faults.is_empty() {
            return Ok(manifest);
        }
    }
    for error in &errors {
        reader.syntax(error);
    }
    reader.faults.sort_by_key(|fault| fault.offset);
    Err(reader.faults)
}

/// Walks the document and keeps every fault, so that one run shows them all. What it returns where it kept a fault is
/// not used.
struct Reader<'t> {
    lines: Lines<'t>,
    faults: Vec<Fault>,
}

/// One fault, by its byte offset.
pub(super) struct Fault {
    pub(super) offset: usize,
    pub(super) subject: String,
    pub(super) problem: String,
    pub(super) reason: Reason,
}

impl Reader<'_> {
    fn document(&mut self, root: &DeTable<'_>) -> Manifest {
        for (key, _) in in_order(root).into_iter().filter(|(key, _)| !TABLES.contains(&&**key.get_ref())) {
            let text: &str = key.get_ref();
            let hint = hint(text, &TABLES);
            self.fault(
                key.span().start,
                &cut(text),
                format!("is not a table of a manifest{hint}; variables belong under [env]"),
            );
        }
        if root.get("env").is_none_or(|env| env.get_ref().as_table().is_some_and(|table| table.is_empty())) {
            let offset = root.get("env").map_or(0, |env| env.span().start);
            self.fault(
                offset,
                "env",
                "declares no variable; add one, for example `DB_PASSWORD = \"database#password\"`",
            );
        }
        let variables = root.get("env").map(|env| self.variables("env", env)).unwrap_or_default();
        let overlays = root.get("environments").map(|tables| self.overlays(tables)).unwrap_or_default();
        Manifest { variables, overlays }
    }

    fn overlays(&mut self, tables: &Value<'_>) -> BTreeMap<EnvironmentName, Vec<Variable>> {
        let mut overlays = BTreeMap::new();
        for (key, value) in self.table("environments", tables) {
            let variables = self.variables(&format!("environments.{}", cut(key.get_ref())), value);
            match EnvironmentName::parse(key.get_ref()) {
                Ok(name) => {
                    overlays.insert(name, variables);
                }
                Err(error) => self.fault(key.span().start, "environments", error.to_string()),
            }
        }
        overlays
    }

    fn variables(&mut self, subject: &str, value: &Value<'_>) -> Vec<Variable> {
        self.table(subject, value).into_iter().filter_map(|(key, value)| self.variable(key, value)).collect()
    }

    fn table<'v, 'i>(&mut self, subject: &str, value: &'v Value<'i>) -> Vec<(&'v Key<'i>, &'v Value<'i>)> {
        if let Some(table) = value.get_ref().as_table() {
            return in_order(table);
        }
        let found = value.get_ref().type_str();
        self.fault(
            value.span().start,
            subject,
            format!("is of type {found}; write it as a table, [{subject}]"),
        );
        Vec::new()
    }

    fn variable(&mut self, key: &Key<'_>, value: &Value<'_>) -> Option<Variable> {
        let subject = cut(key.get_ref());
        let offset = key.span().start;
        let name = VariableName::parse(key.get_ref())
            .map_err(|error| self.fault(offset, &subject, error.problem()))
            .ok();
        let source = self.source(&subject, value);
        Some(Variable { name: name?, source: source?, line: self.lines.line(offset) })
    }

    fn source(&mut self, subject: &str, value: &Value<'_>) -> Option<VariableSource> {
        match value.get_ref() {
            DeValue::String(_) => Some(VariableSource::Reference {
                reference: self.reference(subject, value)?,
                min_length: None,
                allow_empty: false,
            }),
            DeValue::Table(table) => self.detailed(subject, value.span().start, table),
            other => {
                let found = other.type_str();
                self.fault(
                    value.span().start,
                    subject,
                    format!("is of type {found}; write a reference in quotes, or {{ value = \"…\" }}"),
                );
                None
            }
        }
    }

    fn detailed(&mut self, subject: &str, offset: usize, table: &DeTable<'_>) -> Option<VariableSource> {
        if let Some(template) = table.get("template") {
            let problem =
                "templates are not supported yet; inject the parts and join them in the application";
            self.unsupported(template.span().start, subject, problem);
            return None;
        }
        let known = self.refuse_unknown(subject, table);
        match (table.get("ref"), table.get("value")) {
            (Some(reference), None) => self.referring(subject, reference, table),
            (None, Some(value)) => self.literal(subject, value, table),
            (Some(_), Some(value)) => {
                self.fault(value.span().start, subject, "has both `ref` and `value`; keep one of them");
                None
            }
            (None, None) => {
                if known {
                    self.fault(offset, subject, "has neither `ref` nor `value`; give it one of them");
                }
                None
            }
        }
    }

    /// Whether every key is a known one.
    fn refuse_unknown(&mut self, subject: &str, table: &DeTable<'_>) -> bool {
        let unknown: Vec<_> =
            in_order(table).into_iter().filter(|(key, _)| !KEYS.contains(&&**key.get_ref())).collect();
        for (key, _) in &unknown {
            let text: &str = key.get_ref();
            let problem =
                format!("unknown key `{}`{}; known are {}", cut(text), hint(text, &KEYS), KEYS.join(", "));
            self.fault(key.span().start, subject, problem);
        }
        unknown.is_empty()
    }

    fn referring(
        &mut self,
        subject: &str,
        reference: &Value<'_>,
        table: &DeTable<'_>,
    ) -> Option<VariableSource> {
        let reference = self.reference(subject, reference);
        let min_length = table.get("min_length").and_then(|value| self.min_length(subject, value));
        let allow_empty = table.get("allow_empty").is_some_and(|value| self.allow_empty(subject, value));
        if let (Some(_), true, Some(value)) = (min_length, allow_empty, table.get("allow_empty")) {
            let problem = "`allow_empty` and `min_length` contradict each other; keep one of them";
            self.fault(value.span().start, subject, problem);
        }
        if let Some(value) = table.get("as") {
            self.delivery(subject, value);
        }
        Some(VariableSource::Reference { reference: reference?, min_length, allow_empty })
    }

    fn literal(&mut self, subject: &str, value: &Value<'_>, table: &DeTable<'_>) -> Option<VariableSource> {
        for key in KEYS_OF_REFERENCES {
            if let Some(found) = table.get(key) {
                self.fault(found.span().start, subject, format!("`{key}` goes with `ref` only; remove it"));
            }
        }
        let text = self.string(subject, "value", value)?;
        let offset = value.span().start;
        if text.contains('\0') {
            self.fault(
                offset,
                subject,
                "`value` holds a NUL character, which no environment variable can; remove it",
            );
            return None;
        }
        SecretValue::text(text.to_owned())
            .map_err(|error| self.fault(offset, subject, error.to_string()))
            .ok()
            .map(VariableSource::Literal)
    }

    fn reference(&mut self, subject: &str, value: &Value<'_>) -> Option<Reference> {
        let text = self.string(subject, "ref", value)?;
        Reference::parse(text)
            .map_err(|error| {
                let part = match error.reason() {
                    Reason::InvalidEnvironment => "the part before `:` is not an environment's name",
                    Reason::InvalidField => "the part after `#` is not a field's name",
                    Reason::InvalidName => "it is not a secret's name",
                    _ => "it is empty, or has `:` or `#` twice",
                };
                let problem = format!(
                    "{part}; write \"[environment:]name[#field]\", or {{ value = \"…\" }} for a literal"
                );
                self.fault(value.span().start, subject, problem);
            })
            .ok()
    }

    fn min_length(&mut self, subject: &str, value: &Value<'_>) -> Option<usize> {
        let number = value.get_ref().as_integer();
        let number = number.and_then(|number| usize::from_str_radix(number.as_str(), number.radix()).ok());
        let bounded = number.filter(|number| (1..=MAX_VALUE_BYTES).contains(number));
        if bounded.is_none() {
            let problem =
                format!("`min_length` is not a whole number from 1 to {MAX_VALUE_BYTES}; correct it");
            self.fault(value.span().start, subject, problem);
        }
        bounded
    }

    fn allow_empty(&mut self, subject: &str, value: &Value<'_>) -> bool {
        value.get_ref().as_bool().unwrap_or_else(|| {
            self.fault(
                value.span().start,
                subject,
                "`allow_empty` is neither true nor false; write one of them",
            );
            false
        })
    }

    fn delivery(&mut self, subject: &str, value: &Value<'_>) {
        let offset = value.span().start;
        match self.string(subject, "as", value) {
            None | Some("env") => {}
            Some(way @ ("file" | "fd")) => {
                let problem =
                    format!("`as = \"{way}\"` is not supported yet; leave it out to get the value itself");
                self.unsupported(offset, subject, &problem);
            }
            Some(_) => self.fault(offset, subject, "`as` is not \"env\"; correct it or leave it out"),
        }
    }

    fn string<'v>(&mut self, subject: &str, key: &str, value: &'v Value<'_>) -> Option<&'v str> {
        let text = value.get_ref().as_str();
        if text.is_none() {
            let found = value.get_ref().type_str();
            let problem = format!("`{key}` is of type {found}; write it in quotes");
            self.fault(value.span().start, subject, problem);
        }
        text
    }

    fn syntax(&mut self, error: &toml::de::Error) {
        let span = error.span().unwrap_or(self.lines.text.len()..self.lines.text.len());
        let key = self.lines.text.get(span.clone()).filter(|_| error.message() == "duplicate key");
        match key.map(cut) {
            Some(key) => self.fault(span.start, &key, "stands twice; keep one of them"),
            None => self.fault(span.start, "not valid TOML", one_line(error.message())),
        }
    }

    fn fault(&mut self, offset: usize, subject: &str, problem: impl Into<String>) {
        let reason = Reason::InvalidConfig;
        self.faults.push(Fault { offset, subject: subject.to_owned(), problem: problem.into(), reason });
    }

    fn unsupported(&mut self, offset: usize, subject: &str, problem: &str) {
        let reason = Reason::Unsupported;
        self.faults.push(Fault { offset, subject: subject.to_owned(), problem: problem.to_owned(), reason });
    }
}

/// A table's entries in the order of the file. The map's own order depends on how the `toml` crate was built.
fn in_order<'v, 'i>(table: &'v DeTable<'i>) -> Vec<(&'v Key<'i>, &'v Value<'i>)> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

/// ` (did you mean …?)` where a known key is like the unknown one.
fn hint(unknown: &str, known: &[&str]) -> String {
    const ALIKE: f64 = 0.75;
    known
        .iter()
        .map(|candidate| (strsim::jaro_winkler(unknown, candidate), candidate))
        .filter(|(likeness, _)| *likeness > ALIKE)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| format!(" (did you mean `{candidate}`?)"))
        .unwrap_or_default()
}
