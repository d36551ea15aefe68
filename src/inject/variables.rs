//! From answers to variables: every value checked for what an environment can hold, every fault named at once.

use std::collections::BTreeMap;

use super::manifest::{Variable, VariableSource};
use super::name::VariableName;
use super::{InjectError, Notice, VariableProblem, cut, one_line};
use crate::error::{Reason, Reasoned};
use crate::secret::{EnvironmentName, FieldError, Reference, SecretId, SecretName, SecretValue};

/// Variables ready to be injected, by name.
///
/// INVARIANT: every value is text without NUL, so that each becomes exactly one `NAME=value` string.
#[derive(Debug, Clone, Default)]
pub struct Variables {
    values: BTreeMap<VariableName, SecretValue>,
    notices: Vec<Notice>,
}

impl Variables {
    /// The value of one variable.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&SecretValue> {
        self.values.get(name)
    }

    /// Each variable with its value, in the order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&VariableName, &SecretValue)> {
        self.values.iter()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// What is worth a line on stderr.
    #[must_use]
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    fn insert(&mut self, variable: VariableName, value: SecretValue) {
        if is_placeholder(&variable, &value) {
            self.notices.push(Notice::Placeholder { variable: variable.clone() });
        }
        self.values.insert(variable, value);
    }

    fn unless(self, problems: Vec<VariableProblem>) -> Result<Self, InjectError> {
        if problems.is_empty() { Ok(self) } else { Err(InjectError::Variables(problems)) }
    }
}

/// The distinct secrets that the variables refer to, in the order in which they first appear: what to ask for, in one
/// batch. A reference without an environment means `environment`.
#[must_use]
pub fn references(variables: &[Variable], environment: &EnvironmentName) -> Vec<SecretId> {
    let mut seen = std::collections::BTreeSet::new();
    variables
        .iter()
        .filter_map(|variable| match &variable.source {
            VariableSource::Reference { reference, .. } => Some(secret_of(reference, environment)),
            VariableSource::Literal(_) => None,
        })
        .filter(|id| seen.insert(id.clone()))
        .collect()
}

/// Takes each variable's value from the answers: the field it refers to, under the conditions that the manifest sets.
/// `answers` is asked for the secrets that [`references`] names, maybe more than once for the same; its error is a
/// message for people.
///
/// # Errors
/// [`InjectError::Variables`], with every variable that has no value or an unusable one: not answered; no such field;
/// empty without `allow_empty`; shorter than `min_length`; binary; holding NUL.
pub fn resolve(
    variables: &[Variable],
    environment: &EnvironmentName,
    answers: &dyn Fn(&SecretId) -> Result<SecretValue, String>,
) -> Result<Variables, InjectError> {
    let mut resolved = Variables::default();
    let mut problems = Vec::new();
    for variable in variables {
        match value_of(&variable.source, environment, answers) {
            Ok(value) => resolved.insert(variable.name.clone(), value),
            Err(fault) => problems.push(fault.of(subject(variable))),
        }
    }
    resolved.unless(problems)
}

/// Without a manifest: a secret that is a JSON object gives `SECRET_FIELD` for each field, any other text gives
/// `SECRET`; in upper case, and `_` for every character other than `A-Z`, `a-z` and `0-9`.
///
/// # Errors
/// [`InjectError::Variables`], with every fault: two secrets or fields that would give the same variable; a name that
/// no variable may have; a field that is `null`, or an object with a field twice; a value that is empty, binary or
/// holds NUL. The mend for all of them is a manifest, which names and chooses.
pub fn from_secrets(
    secrets: impl IntoIterator<Item = (SecretName, SecretValue)>,
) -> Result<Variables, InjectError> {
    let mut collected = Collected::default();
    for (name, value) in secrets {
        collected.secret(&name, &value);
    }
    collected.finish()
}

fn secret_of(reference: &Reference, environment: &EnvironmentName) -> SecretId {
    let environment = reference.environment.as_ref().unwrap_or(environment);
    SecretId::new(environment.clone(), reference.name.clone())
}

fn subject(variable: &Variable) -> String {
    match &variable.source {
        VariableSource::Reference { reference, .. } => format!("{} ({reference})", variable.name),
        VariableSource::Literal(_) => variable.name.to_string(),
    }
}

fn value_of(
    source: &VariableSource,
    environment: &EnvironmentName,
    answers: &dyn Fn(&SecretId) -> Result<SecretValue, String>,
) -> Result<SecretValue, Fault> {
    let (reference, min_length, allow_empty) = match source {
        VariableSource::Reference { reference, min_length, allow_empty } => {
            (reference, *min_length, *allow_empty)
        }
        VariableSource::Literal(value) => return Ok(value.clone()),
    };
    let whole = answers(&secret_of(reference, environment))
        .map_err(|message| Fault { problem: one_line(&message), reason: Reason::Unavailable })?;
    let value = match &reference.field {
        Some(field) => whole.field(field)?,
        None => whole,
    };
    if !allow_empty {
        not_empty(&value, "put a value, or say `allow_empty = true` in the manifest")?;
    }
    usable(&value)?;
    long_enough(&value, min_length)?;
    Ok(value)
}

fn not_empty(value: &SecretValue, mend: &str) -> Result<(), Fault> {
    if value.is_empty() {
        return Err(Fault { problem: format!("the value is empty; {mend}"), reason: Reason::ValueEmpty });
    }
    Ok(())
}

/// Whether an environment can hold it: `NAME=value` ends at the first NUL, and programs expect text.
fn usable(value: &SecretValue) -> Result<(), Fault> {
    let problem = match value.expose_text() {
        None => "the value is binary and a variable holds text; store it as text, for example in base64",
        Some(text) if text.contains('\0') => {
            "the value holds a NUL character, which no variable can; store it without, for example in base64"
        }
        Some(_) => return Ok(()),
    };
    Err(Fault { problem: problem.to_owned(), reason: Reason::InvalidValue })
}

/// How long the value is stays unsaid: a length narrows a guess.
fn long_enough(value: &SecretValue, min_length: Option<usize>) -> Result<(), Fault> {
    let Some(least) = min_length else { return Ok(()) };
    let enough = value.expose_text().is_some_and(|text| text.chars().nth(least.saturating_sub(1)).is_some());
    if enough {
        return Ok(());
    }
    let problem = format!(
        "the value is shorter than the {least} characters that the manifest asks for; put a longer one"
    );
    Err(Fault { problem, reason: Reason::InvalidValue })
}

/// What people leave behind when they mean to fill it in later.
fn is_placeholder(variable: &VariableName, value: &SecretValue) -> bool {
    value.expose_text().is_some_and(|text| {
        text.eq_ignore_ascii_case("changeme") || text.eq_ignore_ascii_case(variable.as_str())
    })
}

/// A problem before it is known whose.
struct Fault {
    problem: String,
    reason: Reason,
}

impl Fault {
    fn of(self, subject: String) -> VariableProblem {
        VariableProblem { subject, problem: self.problem, reason: self.reason }
    }
}

impl From<FieldError> for Fault {
    fn from(error: FieldError) -> Self {
        Self { problem: one_line(&error.to_string()), reason: error.reason() }
    }
}

/// What secrets give, before it is known whether two give the same.
#[derive(Default)]
struct Collected {
    candidates: BTreeMap<VariableName, Vec<(String, SecretValue)>>,
    notices: Vec<Notice>,
    problems: Vec<VariableProblem>,
}

impl Collected {
    fn secret(&mut self, name: &SecretName, value: &SecretValue) {
        match value.fields() {
            Ok(fields) if fields.is_empty() => self.notices.push(Notice::NoFields { secret: name.clone() }),
            Ok(fields) => {
                for (field, member) in fields {
                    let origin = format!("{name}#{}", cut(&field));
                    self.offer(&format!("{name}_{field}"), origin, member.map_err(Fault::from));
                }
            }
            // A password or a template may begin with a brace, so this is no fault of the value.
            Err(FieldError::NotJson { .. }) => {
                self.notices.push(Notice::NotJson { secret: name.clone() });
                self.offer(name.as_str(), name.to_string(), Ok(value.clone()));
            }
            Err(FieldError::NotAnObject { .. }) => {
                self.offer(name.as_str(), name.to_string(), Ok(value.clone()))
            }
            Err(error) => self.problems.push(Fault::from(error).of(format!("secret `{name}`"))),
        }
    }

    fn offer(&mut self, joined: &str, origin: String, value: Result<SecretValue, Fault>) {
        let checked = value.and_then(|value| {
            not_empty(
                &value,
                "put a value, or declare the variable in a manifest with `allow_empty = true`",
            )?;
            usable(&value)?;
            Ok(value)
        });
        let name = VariableName::parse(&as_variable(joined)).map_err(|error| Fault {
            problem: format!("{error}; a manifest can give it another name"),
            reason: error.reason(),
        });
        match (name, checked) {
            (Ok(name), Ok(value)) => self.candidates.entry(name).or_default().push((origin, value)),
            (name, checked) => {
                let faults = name.err().into_iter().chain(checked.err());
                self.problems.extend(faults.map(|fault| fault.of(format!("secret `{origin}`"))));
            }
        }
    }

    fn finish(self) -> Result<Variables, InjectError> {
        let Self { candidates, notices, mut problems } = self;
        let mut variables = Variables { values: BTreeMap::new(), notices };
        for (name, mut candidates) in candidates {
            match (candidates.pop(), candidates.is_empty()) {
                (Some((_, value)), true) => variables.insert(name, value),
                (last, _) => problems.push(collision(&name, candidates.into_iter().chain(last))),
            }
        }
        variables.unless(problems)
    }
}

fn collision(
    name: &VariableName,
    candidates: impl Iterator<Item = (String, SecretValue)>,
) -> VariableProblem {
    let origins: Vec<_> = candidates.map(|(origin, _)| format!("`{origin}`")).collect();
    VariableProblem {
        subject: cut(name.as_str()),
        problem: format!("{} would all set it; a manifest can give each its own name", origins.join(" and ")),
        reason: Reason::InvalidArgument,
    }
}

fn as_variable(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Manifest;
    use super::*;
    use crate::secret::ContentType;
    use proptest::prelude::*;

    const CANARY: &str = "canary-5f3a";

    fn staging() -> EnvironmentName {
        EnvironmentName::parse("staging").unwrap()
    }

    fn text(text: &str) -> SecretValue {
        SecretValue::text(text.to_owned()).unwrap()
    }

    fn declared(entries: &str) -> Vec<Variable> {
        Manifest::parse(&format!("[env]\n{entries}"), "m").unwrap().variables_for(&staging())
    }

    /// Resolves against a store that holds one value under every name but `absent`.
    fn resolved(entries: &str, value: &SecretValue) -> Result<Variables, InjectError> {
        resolve(&declared(entries), &staging(), &|id: &SecretId| match id.name.as_str() {
            "absent" => Err(format!("secret `absent` is not in environment `{}`", id.environment)),
            _ => Ok(value.clone()),
        })
    }

    fn problems(error: InjectError) -> Vec<String> {
        match error {
            InjectError::Variables(problems) => problems.iter().map(ToString::to_string).collect(),
            other => panic!("{other}"),
        }
    }

    fn secrets(all: &[(&str, &str)]) -> Result<Variables, InjectError> {
        from_secrets(all.iter().map(|(name, value)| (SecretName::parse(name).unwrap(), text(value))))
    }

    fn pairs(variables: &Variables) -> Vec<(&str, &str)> {
        variables.iter().map(|(name, value)| (name.as_str(), value.expose_text().unwrap())).collect()
    }

    #[test]
    fn each_secret_is_asked_for_once() {
        let variables = declared(
            "A = \"db#x\"\nB = \"production:db#x\"\nC = \"db#y\"\nD = { value = \"d\" }\nE = \"cache\"\nF = \"staging:db\"",
        );
        let asked: Vec<_> = references(&variables, &staging()).iter().map(ToString::to_string).collect();
        assert_eq!(asked, ["staging:db", "production:db", "staging:cache"]);
    }

    #[test]
    fn values_arrive_exactly() {
        let value = text("{\"port\":5432,\"text\":\"a\\r\\nADMIN=1 $(id) {{x}}\"}");
        let variables =
            resolved("P = \"db#port\"\nT = \"db#text\"\nL = { value = \"\" }\nW = \"db\"", &value).unwrap();
        assert_eq!(
            pairs(&variables),
            [
                ("L", ""),
                ("P", "5432"),
                ("T", "a\r\nADMIN=1 $(id) {{x}}"),
                ("W", "{\"port\":5432,\"text\":\"a\\r\\nADMIN=1 $(id) {{x}}\"}"),
            ]
        );
        assert!(variables.notices().is_empty());
    }

    #[test]
    fn all_faults_are_named_at_once() {
        let value = text("{\"a\":\"short\",\"empty\":\"\",\"nul\":\"a\\u0000b\",\"null\":null}");
        let error = resolved(
            "OK = \"db#a\"\nA = \"absent#x\"\nB = \"db#b\"\nC = \"db#empty\"\nD = \"db#nul\"\nE = \"db#null\"\n\
             F = { ref = \"db#a\", min_length = 6 }",
            &value,
        )
        .unwrap_err();
        assert_eq!(
            problems(error),
            [
                "A (absent#x): secret `absent` is not in environment `staging`",
                "B (db#b): no field `b`; the value has 4 other fields",
                "C (db#empty): the value is empty; put a value, or say `allow_empty = true` in the manifest",
                "D (db#nul): the value holds a NUL character, which no variable can; store it without, for example in \
                 base64",
                "E (db#null): the field `null` is null; put a value with the field set",
                "F (db#a): the value is shorter than the 6 characters that the manifest asks for; put a longer one",
            ]
        );
    }

    #[test]
    fn conditions_count_characters_and_empty_needs_leave() {
        assert!(resolved("A = { ref = \"a\", min_length = 3 }", &text("äöü")).is_ok());
        assert!(resolved("A = { ref = \"a\", min_length = 4 }", &text("äöü")).is_err());
        assert!(resolved("A = { ref = \"a\", allow_empty = true }", &text("")).is_ok());
        assert_eq!(resolved("A = \"a\"", &text("")).unwrap_err().reason(), Reason::ValueEmpty);
    }

    #[test]
    fn what_an_environment_cannot_hold_is_refused() {
        let binary = SecretValue::new(vec![0xff, 0xfe], ContentType::Binary).unwrap();
        for value in [binary.clone(), text("a\0b")] {
            assert_eq!(resolved("A = \"a\"", &value).unwrap_err().reason(), Reason::InvalidValue);
        }
        let error = from_secrets([(SecretName::parse("key").unwrap(), binary)]).unwrap_err();
        let problems = problems(error);
        assert!(problems[0].starts_with("secret `key`: the value is binary"), "{problems:?}");
    }

    #[test]
    fn placeholders_are_noticed_and_used() {
        for (value, expected) in [("changeme", 1), ("ChangeMe", 1), ("A_B", 1), ("a_b", 1), ("real", 0)] {
            let variables = resolved("A_B = \"a\"", &text(value)).unwrap();
            assert_eq!(variables.notices().len(), expected, "{value}");
            assert_eq!(variables.get("A_B").unwrap().expose_text(), Some(value));
        }
    }

    #[test]
    fn a_strangers_message_stays_on_one_line() {
        let error = resolve(&declared("A = \"a\""), &staging(), &|_: &SecretId| {
            Err("no\nADMIN=1\u{1b}[2J".to_owned())
        });
        assert_eq!(problems(error.unwrap_err()), [r"A (a): no\nADMIN=1\u{1b}[2J"]);
    }

    #[test]
    fn without_a_manifest_names_are_derived() {
        let variables = secrets(&[
            ("database", r#"{"user-name":"app","port":5432,"nested":{"a":[1]}}"#),
            ("team/api.key", "plain"),
            ("list", "[1, 2]"),
        ])
        .unwrap();
        assert_eq!(
            pairs(&variables),
            [
                ("DATABASE_NESTED", r#"{"a":[1]}"#),
                ("DATABASE_PORT", "5432"),
                ("DATABASE_USER_NAME", "app"),
                ("LIST", "[1, 2]"),
                ("TEAM_API_KEY", "plain"),
            ]
        );
    }

    #[test]
    fn a_value_that_only_begins_like_json_is_taken_whole() {
        let variables = secrets(&[("template", "{{x}}"), ("none", "{}")]).unwrap();
        assert_eq!(pairs(&variables), [("TEMPLATE", "{{x}}")]);
        let notices: Vec<_> = variables.notices().iter().map(ToString::to_string).collect();
        assert_eq!(
            notices,
            [
                "secret `template` begins like a JSON object but is none; it is injected as it is",
                "secret `none` is a JSON object without fields; it gives no variable",
            ]
        );
    }

    #[test]
    fn derived_names_that_collide_or_may_not_be_are_fatal() {
        let error = secrets(&[
            ("db", r#"{"a-b":"1","a_b":"2","a.b":"3"}"#),
            ("db/c", "4"),
            ("db.c", "5"),
            ("1st", "6"),
            ("ld", r#"{"preload":"/tmp/evil.so"}"#),
            ("path", "/tmp"),
            ("empty", r#"{"x":"","y":null}"#),
            ("twice", r#"{"x":"1","x":"2"}"#),
        ])
        .unwrap_err();
        let problems = problems(error);
        let told = |start: &str| problems.iter().filter(|problem| problem.starts_with(start)).count();
        for start in [
            "DB_A_B: `db#a-b` and `db#a.b` and `db#a_b` would all set it",
            "DB_C: `db/c` and `db.c` would all set it",
            "secret `1st`: variable `1ST`: the name starts with a digit",
            "secret `ld#preload`: variable `LD_PRELOAD`: the name is reserved",
            "secret `path`: variable `PATH`: the name is reserved",
            "secret `empty#x`: the value is empty",
            "secret `empty#y`: the field `y` is null",
            "secret `twice`: the value has the field `x` twice",
        ] {
            assert_eq!(told(start), 1, "{start}: {problems:#?}");
        }
        assert_eq!(problems.len(), 8, "{problems:#?}");
    }

    #[test]
    fn neither_errors_nor_debug_show_a_value() {
        let object = format!("{{\"a\":\"{CANARY}\",\"n\":\"{CANARY}\\u0000\"}}");
        let variables = resolved("A = \"db#a\"\nB = { value = \"canary-5f3a\" }", &text(&object)).unwrap();
        assert!(!format!("{variables:?}").contains(CANARY));
        for entries in ["A = \"db#n\"", "A = \"db#z\"", "A = { ref = \"db#a\", min_length = 99 }"] {
            let error = resolved(entries, &text(&object)).unwrap_err();
            assert!(!format!("{error} {error:?}").contains(CANARY), "{error}");
        }
        let collision = format!("{{\"a-b\":\"{CANARY}\",\"a_b\":\"{CANARY}\",\"c\":\"{CANARY}\\u0000\"}}");
        let error = secrets(&[("db", &collision)]).unwrap_err();
        assert!(!format!("{error} {error:?}").contains(CANARY), "{error}");
    }

    proptest! {
        #[test]
        fn derivation_never_panics_and_problems_are_one_line_each(
            name in "[a-z0-9/._-]{1,6}", value in "(?s)(\\{(\"(?s).{0,4}\":(1|\"(?s).{0,4}\"|null),?){0,3}\\}|.{0,20})",
        ) {
            if let Ok(name) = SecretName::parse(&name) {
                match from_secrets([(name, text(&value))]) {
                    Ok(variables) => {
                        for (name, value) in variables.iter() {
                            prop_assert!(VariableName::parse(name.as_str()).is_ok());
                            prop_assert!(!value.expose().contains(&0));
                        }
                    }
                    Err(InjectError::Variables(problems)) => {
                        for problem in problems {
                            prop_assert!(!problem.to_string().chars().any(char::is_control));
                        }
                    }
                    Err(other) => return Err(TestCaseError::fail(other.to_string())),
                }
            }
        }
    }
}
