//! Expected decisions: the access matrix as cases that a policy set must answer so.
//!
//! ```toml
//! [[case]]
//! name = "operators delete in production with two approvals"
//! principal = { kind = "user", id = "eli", groups = ["operators"], claims = { } }
//! action = "delete"
//! resource = "production:database"      # or "production", or "claviger" for the broker
//! reason = "…"                          # optional
//! expect = "approval_required"          # or "allow", or "deny"
//! approvals = 2                         # optional; only where approvals are expected
//! policies = ["protected-operators-change"]    # optional: exactly these decide
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Deserialize;
use toml::Spanned;

use super::entities::{BROKER, Question};
use super::source::SourceFile;
use super::{Action, Context, Decision, Effect, Policies, PolicyError, PolicySource, Resource};
use crate::identity::{Principal, PrincipalKind, Proof};
use crate::secret::{EnvironmentName, NameError, SecretId};

/// One question with the answer that is expected.
#[derive(Debug, Clone)]
pub struct Expectation {
    name: String,
    principal: Arc<Principal>,
    action: Action,
    resource: Resource,
    context: Context,
    expect: Expect,
    approvals: Option<u8>,
    policies: Option<BTreeSet<String>>,
}

/// What became of an expectation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectationReport {
    /// The case's name.
    pub name: String,
    /// Whether what was found is what was expected.
    pub passed: bool,
    /// The effect that was expected, and the policies where the case names them.
    pub expected: String,
    /// The effect that was found, and the policies where the case names them.
    pub found: String,
    /// The ids of the policies that decided, sorted.
    pub policies: Vec<Arc<str>>,
}

/// Reads the expected decisions of a source: the `*.toml` under `tests/`. Reads files: not for an asynchronous task.
///
/// # Errors
/// [`PolicyError`], naming file, line and column: a file that can't be read or is not TOML, an unknown key, a value that
/// makes no sense, two cases of one name; and where there is no case at all.
pub fn load_expectations(source: &PolicySource) -> Result<Vec<Expectation>, PolicyError> {
    let files = source.expectations()?;
    let mut expectations: Vec<Expectation> = Vec::new();
    let mut places: BTreeMap<String, String> = BTreeMap::new();
    for file in &files {
        for case in parse(file)? {
            let (name, offset) = (case.name.get_ref().clone(), case.name.span().start);
            if let Some(first) = places.insert(name, file.place(offset)) {
                return Err(
                    file.invalid(offset, &format!("the case at {first} has the same name; rename one"))
                );
            }
            expectations.push(case.resolve(file)?);
        }
    }
    if expectations.is_empty() {
        return Err(PolicyError::Unreadable {
            path: source.place(),
            problem: "no expected decision is there; write [[case]] tables in a .toml file under `tests`"
                .to_owned(),
        });
    }
    Ok(expectations)
}

impl Expectation {
    /// The case's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Asks the current policies. Grants nothing.
    #[must_use]
    pub fn check(&self, policies: &Policies) -> ExpectationReport {
        let found = policies.decide(Question {
            principal: &self.principal,
            action: self.action,
            resource: &self.resource,
            context: &self.context,
        });
        let deciding = |policies: &[String]| match self.policies {
            Some(_) if policies.is_empty() => " by no policy".to_owned(),
            Some(_) => format!(" by {}", policies.join(", ")),
            None => String::new(),
        };
        let found_ids: Vec<String> = found.policies.iter().map(|id| id.to_string()).collect();
        let expected_ids: Vec<String> = self.policies.iter().flatten().cloned().collect();
        ExpectationReport {
            name: self.name.clone(),
            passed: self.is_met_by(&found),
            expected: format!("{}{}", effect(self.expect.name(), self.approvals), deciding(&expected_ids)),
            found: format!("{}{}", effect(found.effect.as_str(), approvals_of(&found)), deciding(&found_ids)),
            policies: found.policies.clone(),
        }
    }

    fn is_met_by(&self, found: &Decision) -> bool {
        let approvals = self.approvals.is_none() || self.approvals == approvals_of(found);
        let policies = self.policies.as_ref().is_none_or(|expected| {
            expected.iter().map(String::as_str).eq(found.policies.iter().map(|id| &**id))
        });
        // A policy that can't be evaluated denies, but nobody expects it to.
        self.expect.name() == found.effect.as_str() && approvals && policies && !found.evaluation_failed
    }
}

fn approvals_of(decision: &Decision) -> Option<u8> {
    match decision.effect {
        Effect::ApprovalRequired(approvals) => Some(approvals),
        Effect::Allow | Effect::Deny => None,
    }
}

fn effect(name: &str, approvals: Option<u8>) -> String {
    match approvals {
        Some(approvals) => format!("{name} ({approvals})"),
        None => name.to_owned(),
    }
}

/// A file as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    #[serde(default)]
    case: Vec<Case>,
}

/// A case as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: Spanned<String>,
    principal: Caller,
    action: Spanned<String>,
    resource: Spanned<String>,
    reason: Option<String>,
    expect: Expect,
    approvals: Option<Spanned<u8>>,
    policies: Option<BTreeSet<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Caller {
    kind: PrincipalKind,
    id: String,
    #[serde(default)]
    groups: BTreeSet<String>,
    #[serde(default)]
    claims: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Expect {
    Allow,
    Deny,
    ApprovalRequired,
}

impl Expect {
    const fn name(self) -> &'static str {
        match self {
            Self::Allow => Effect::Allow.as_str(),
            Self::Deny => Effect::Deny.as_str(),
            Self::ApprovalRequired => Effect::ApprovalRequired(1).as_str(),
        }
    }
}

fn parse(file: &SourceFile) -> Result<Vec<Case>, PolicyError> {
    let cases: Cases = toml::from_str(&file.text).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start);
        file.invalid(offset, error.message())
    })?;
    if cases.case.is_empty() {
        return Err(file.invalid(0, "there is no [[case]] in this file; write one or delete the file"));
    }
    Ok(cases.case)
}

impl Case {
    fn resolve(self, file: &SourceFile) -> Result<Expectation, PolicyError> {
        if let Some(approvals) = &self.approvals
            && (self.expect != Expect::ApprovalRequired || *approvals.get_ref() == 0)
        {
            let problem = "approvals is 1 or more, and stands only beside expect = \"approval_required\"";
            return Err(file.invalid(approvals.span().start, problem));
        }
        let action = Action::parse(self.action.get_ref())
            .map_err(|error| file.invalid(self.action.span().start, &error.to_string()))?;
        let resource = resource(self.resource.get_ref())
            .map_err(|error| file.invalid(self.resource.span().start, &error.to_string()))?;
        let Caller { kind, id, groups, claims } = self.principal;
        let proof = Proof { method: "expectation", detail: String::new() };
        Ok(Expectation {
            name: self.name.into_inner(),
            principal: Arc::new(Principal::new(kind, id, groups, claims, proof)),
            action,
            resource,
            context: Context { reason: self.reason },
            expect: self.expect,
            approvals: self.approvals.map(Spanned::into_inner),
            policies: self.policies,
        })
    }
}

/// `claviger`, `environment` or `environment:name`.
fn resource(text: &str) -> Result<Resource, NameError> {
    match text.split_once(':') {
        Some((environment, name)) => SecretId::parse(environment, name).map(Resource::Secret),
        None if text == BROKER => Ok(Resource::Broker),
        None => EnvironmentName::parse(text).map(Resource::Environment),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> PolicySource {
        PolicySource::Texts(vec![("tests/a.toml".to_owned(), text.to_owned())])
    }

    const CASE: &str = r#"
[[case]]
name = "one"
principal = { kind = "user", id = "ana", groups = ["team"] }
action = "read"
resource = "development:database"
expect = "allow"
"#;

    #[test]
    fn a_case_is_read_as_written() {
        let cases = load_expectations(&texts(CASE)).unwrap();
        assert_eq!(cases.len(), 1);
        let case = &cases[0];
        assert_eq!(case.name(), "one");
        assert_eq!(case.principal.to_string(), r#"User::"ana""#);
        assert_eq!(case.action, Action::Read);
        assert_eq!(case.resource.to_string(), "secret `database` in environment `development`");
        assert!(matches!(resource("claviger"), Ok(Resource::Broker)));
        assert!(matches!(resource("staging"), Ok(Resource::Environment(_))));
    }

    #[test]
    fn mistakes_are_placed() {
        for (from, to, expected) in [
            ("expect = \"allow\"", "expect = \"maybe\"", "tests/a.toml:7:"),
            ("expect = \"allow\"", "expct = \"allow\"", "expct"),
            ("kind = \"user\"", "kind = \"users\"", "tests/a.toml:4:"),
            ("id = \"ana\"", "id = \"ana\", group = [\"team\"]", "group"),
            (
                "action = \"read\"",
                "action = \"raed\"",
                "a.toml:5:10: unknown action `raed`; did you mean `read`?",
            ),
            ("development:database", "development:../x", "a.toml:6:12: secret name"),
            ("development:database", "Development", "a.toml:6:12: environment"),
            ("expect = \"allow\"", "expect = \"allow\"\napprovals = 2", "a.toml:8:13: approvals"),
            ("expect = \"allow\"", "expect = \"approval_required\"\napprovals = 0", "a.toml:8:13: approvals"),
            ("name = \"one\"", "", "name"),
            ("[[case]]", "[[case", "a.toml:"),
        ] {
            let error = load_expectations(&texts(&CASE.replace(from, to))).unwrap_err().to_string();
            assert!(error.contains(expected), "{to}: {error}");
            assert!(error.contains("a.toml:"), "{to}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn names_are_unique_and_there_is_at_least_one_case() {
        let error = load_expectations(&texts(&CASE.repeat(2))).unwrap_err().to_string();
        assert!(error.contains("a.toml:10:8: the case at tests/a.toml:3:8 has the same name"), "{error}");
        assert!(load_expectations(&texts("")).is_err());
        assert!(load_expectations(&texts("# nothing\n")).is_err());
        assert!(load_expectations(&PolicySource::Texts(Vec::new())).is_err());
    }
}
