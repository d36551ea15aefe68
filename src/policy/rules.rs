//! From texts to rules: parses, keeps the house rules, and validates strictly against the schema. Every complaint names
//! file, line, column and policy.
//!
//! Nothing of a set is used unless all of it is right: a set without one of its `forbid`s is a different set.

use std::collections::HashMap;
use std::sync::Arc;

use cedar_policy::ffi::DetailedError;
use cedar_policy::{
    Effect as CedarEffect, EntityUid, ParseErrors, Policy, PolicyId, PolicySet, Schema, ValidationError,
    ValidationMode, Validator,
};
use jiff::Timestamp;

use super::entities::{BROKER, Vocabulary};
use super::slice::{Constraint, Scope};
use super::source::{PolicySource, SourceFile, one_line};
use super::{Action, PolicyError};
use crate::environment::Registry;

/// The most policies in one set.
const MAX_POLICIES: usize = 10_000;
const MAX_ID: usize = 64;
const ANNOTATIONS: [&str; 5] = ["id", "approvals", "expires", "allow_wildcard", "loud"];
/// How far a policy may look: at the principal, the action, the resource and what they are in, but not through them at
/// other entities, which the broker does not supply (Cedar RFC 76, level validation).
const LEVEL: u32 = 1;

/// A policy with what the house reads from its annotations.
pub(super) struct Rule {
    pub(super) id: Arc<str>,
    /// The file's name.
    pub(super) file: Arc<str>,
    /// File, line, column and id, for messages.
    pub(super) place: String,
    pub(super) policy: Policy,
    pub(super) scope: Scope,
    /// How many approvals by others a permit needs.
    pub(super) approvals: Option<u8>,
    /// From when on it is inert.
    pub(super) expires: Option<Timestamp>,
    /// Whether its decisions are warnings.
    pub(super) loud: bool,
    /// Whether it may look at the request's context.
    pub(super) reads_context: bool,
    /// Why it may permit as much as it does.
    wildcard: Option<String>,
}

impl Rule {
    pub(super) fn permits(&self) -> bool {
        self.policy.effect() == CedarEffect::Permit
    }

    fn refuse(&self, problem: &str) -> PolicyError {
        PolicyError::Invalid { place: self.place.clone(), problem: problem.to_owned() }
    }
}

/// Everything that was loaded together.
pub(super) struct RuleSet {
    pub(super) rules: Vec<Rule>,
    by_id: HashMap<Arc<str>, usize>,
    pub(super) vocabulary: Vocabulary,
    pub(super) warnings: Vec<String>,
}

impl RuleSet {
    /// Reads, checks and validates a set.
    pub(super) fn load(source: &PolicySource, registry: &Registry) -> Result<Self, PolicyError> {
        let files = source.policies()?;
        let schema = schema(&files.schema)?;
        let vocabulary = Vocabulary::of(&schema).map_err(|problem| files.schema.invalid(0, &problem))?;
        let mut draft = Draft::default();
        for file in &files.policies {
            draft.read(file, &vocabulary)?;
        }
        let mut warnings = files.warnings;
        warnings.extend(draft.validate(schema, &files.place)?);
        let Draft { rules, by_id, .. } = draft;
        for rule in &rules {
            warnings.extend(wildcard(rule, &vocabulary, registry)?);
            warnings.extend(unknown_names(rule, &vocabulary, registry));
        }
        Ok(Self { rules, by_id, vocabulary, warnings })
    }

    /// The rule that Cedar calls so.
    pub(super) fn rule(&self, id: &PolicyId) -> Option<&Rule> {
        let id: &str = id.as_ref();
        self.rules.get(*self.by_id.get(id)?)
    }
}

fn schema(file: &SourceFile) -> Result<Schema, PolicyError> {
    match Schema::from_cedarschema_str(&file.text) {
        Ok((schema, _)) => Ok(schema),
        Err(error) => {
            let complaint = Complaint::from(DetailedError::from(&error));
            Err(file.invalid(complaint.offset.unwrap_or(0), &complaint.message))
        }
    }
}

/// Rules as they come out of the files, not yet validated.
#[derive(Default)]
struct Draft<'a> {
    rules: Vec<Rule>,
    /// The file of each rule.
    files: Vec<&'a SourceFile>,
    by_id: HashMap<Arc<str>, usize>,
}

impl<'a> Draft<'a> {
    fn read(&mut self, file: &'a SourceFile, vocabulary: &Vocabulary) -> Result<(), PolicyError> {
        let set = parse(file)?;
        let (mut end, mut places) = (0, file.places());
        // Policies come in the order of the text, so each is found behind the one before it.
        for policy in set.policies() {
            let text = policy.to_cedar().unwrap_or_default();
            let rest = file.text.get(end..).unwrap_or_default();
            let start = end + rest.find(text.as_str()).unwrap_or(0);
            end = start + text.len();
            self.add(rule(file, &places.at(start), &text, policy, vocabulary)?, file)?;
        }
        Ok(())
    }

    fn add(&mut self, rule: Rule, file: &'a SourceFile) -> Result<(), PolicyError> {
        if self.rules.len() == MAX_POLICIES {
            let problem =
                format!("there are more than {MAX_POLICIES} policies; let groups do the work of single ids");
            return Err(rule.refuse(&problem));
        }
        if let Some(taken) = self.by_id.get(&rule.id).and_then(|number| self.rules.get(*number)) {
            return Err(
                rule.refuse(&format!("the id is taken by {}; ids are unique across files", taken.place))
            );
        }
        self.by_id.insert(Arc::clone(&rule.id), self.rules.len());
        self.rules.push(rule);
        self.files.push(file);
        Ok(())
    }

    /// Validates all policies strictly. Gives Cedar's warnings.
    fn validate(&self, schema: Schema, place: &str) -> Result<Vec<String>, PolicyError> {
        let policies = self.rules.iter().map(|rule| rule.policy.clone());
        let set = PolicySet::from_policies(policies).map_err(|error| PolicyError::Invalid {
            place: place.to_owned(),
            problem: one_line(&error.to_string()),
        })?;
        let result = Validator::new(schema).validate_with_level(&set, ValidationMode::Strict, LEVEL);
        let errors = result.validation_errors().map(|error| {
            let complaint = Complaint::from(DetailedError::from(error)).with_mend_for(error);
            self.placed(error.policy_id(), complaint)
        });
        let errors = in_order(errors.collect());
        if let Some((place, problem)) = errors.first() {
            let more = match errors.len() - 1 {
                0 => String::new(),
                more => format!(" (and {more} more like it)"),
            };
            return Err(PolicyError::Invalid { place: place.clone(), problem: format!("{problem}{more}") });
        }
        let warnings = result
            .validation_warnings()
            .map(|warning| self.placed(warning.policy_id(), Complaint::from(DetailedError::from(warning))));
        Ok(in_order(warnings.collect())
            .into_iter()
            .map(|(place, problem)| format!("{place}: {problem}"))
            .collect())
    }

    /// A complaint with the position that it sorts by.
    fn placed(&self, id: &PolicyId, complaint: Complaint) -> (usize, usize, String, String) {
        let text: &str = id.as_ref();
        let number = self.by_id.get(text).copied().unwrap_or(usize::MAX);
        let offset = complaint.offset.unwrap_or(0);
        let place = match (self.rules.get(number), self.files.get(number), complaint.offset) {
            (Some(rule), Some(file), Some(offset)) => placed(file, offset, &rule.id),
            (Some(rule), ..) => rule.place.clone(),
            _ => format!("policy `{text}`"),
        };
        let message = complaint.message.replace(&format!("for policy `{text}`, "), "");
        (number, offset, place, message)
    }
}

/// Sorts complaints by position, so that the same mistakes give the same message each time.
fn in_order(mut complaints: Vec<(usize, usize, String, String)>) -> Vec<(String, String)> {
    complaints.sort();
    complaints.into_iter().map(|(_, _, place, message)| (place, message)).collect()
}

/// What Cedar has to say about a text.
struct Complaint {
    offset: Option<usize>,
    message: String,
}

impl From<DetailedError> for Complaint {
    fn from(error: DetailedError) -> Self {
        let label = error.source_locations.into_iter().next();
        let offset = label.as_ref().map(|label| label.loc.start);
        let hint = error.help.or_else(|| label.and_then(|label| label.label));
        let message = match hint {
            Some(hint) => format!("{}; {hint}", error.message),
            None => error.message,
        };
        Self { offset, message: one_line(&message) }
    }
}

impl Complaint {
    /// Adds what to do where Cedar does not say.
    fn with_mend_for(mut self, error: &ValidationError) -> Self {
        if matches!(error, ValidationError::EntityDerefLevelViolation(_)) {
            self.message.push_str("; read attributes and tags of `principal` and `resource` only");
        }
        self
    }
}

fn placed(file: &SourceFile, offset: usize, id: &str) -> String {
    with_id(&file.place(offset), id)
}

fn with_id(place: &str, id: &str) -> String {
    format!("{place}, policy `{id}`")
}

fn parse(file: &SourceFile) -> Result<PolicySet, PolicyError> {
    let set = file.text.parse::<PolicySet>().map_err(|errors: ParseErrors| {
        let complaint = Complaint::from(DetailedError::from(&errors));
        file.invalid(complaint.offset.unwrap_or(0), &complaint.message)
    })?;
    if let Some(template) = set.templates().next() {
        let offset = file.text.find(&template.to_cedar()).unwrap_or(0);
        let problem = "is a template, which nothing fills in; write the principal and the resource out";
        return Err(file.invalid(offset, problem));
    }
    if set.is_empty() {
        return Err(file.invalid(0, "there is no policy in this file; write one or delete the file"));
    }
    Ok(set)
}

/// Reads one policy's annotations and head.
fn rule(
    file: &SourceFile,
    at: &str,
    text: &str,
    policy: &Policy,
    vocabulary: &Vocabulary,
) -> Result<Rule, PolicyError> {
    let refused = |place: &str, problem: &str| PolicyError::Invalid {
        place: place.to_owned(),
        problem: one_line(problem),
    };
    let id = id(policy).map_err(|problem| refused(at, &problem))?;
    let place = with_id(at, &id);
    let refuse = |problem: String| refused(&place, &problem);
    known_annotations(policy).map_err(refuse)?;
    Ok(Rule {
        file: Arc::clone(&file.name),
        scope: Scope::of(policy, vocabulary),
        approvals: approvals(policy).map_err(refuse)?,
        expires: expires(policy).map_err(refuse)?,
        loud: loud(policy).map_err(refuse)?,
        wildcard: allowed_wildcard(policy).map_err(refuse)?,
        // The word can't be written any other way, so a text without it can't read the context. One that has it in a
        // comment is taken to read it, which costs a cached decision and nothing else.
        reads_context: text.is_empty() || text.contains("context"),
        policy: policy.new_id(PolicyId::new(&id)),
        place,
        id: id.into(),
    })
}

fn id(policy: &Policy) -> Result<String, String> {
    let id = policy.annotation("id").ok_or("a policy has no @id; write @id(\"short-name\") above it")?;
    let permitted = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if id.is_empty() || id.len() > MAX_ID || !id.chars().all(permitted) {
        return Err(format!(
            "@id(\"{}\") is not 1 to {MAX_ID} of A-Z, a-z, 0-9 and ._-",
            id.escape_default().take(MAX_ID).collect::<String>()
        ));
    }
    Ok(id.to_owned())
}

fn known_annotations(policy: &Policy) -> Result<(), String> {
    let Some((unknown, _)) = policy.annotations().find(|(name, _)| !ANNOTATIONS.contains(name)) else {
        return Ok(());
    };
    let nearest = nearest(unknown, ANNOTATIONS).unwrap_or_default();
    Err(format!("unknown annotation @{unknown}; did you mean @{nearest}? Notes go into comments"))
}

fn approvals(policy: &Policy) -> Result<Option<u8>, String> {
    let Some(text) = policy.annotation("approvals") else { return Ok(None) };
    if policy.effect() == CedarEffect::Forbid {
        return Err("@approvals is for a permit; what is forbidden stays so whoever approves".to_owned());
    }
    match text.parse::<u8>() {
        Ok(0) => Err("@approvals(\"0\") asks for nothing; remove it, or ask for 1 or more".to_owned()),
        // Written as one would count: no sign, no leading zero.
        Ok(count) if count.to_string() == text => Ok(Some(count)),
        _ => Err(format!("@approvals(\"{}\") is not a number from 1 to 255", text.escape_default())),
    }
}

fn expires(policy: &Policy) -> Result<Option<Timestamp>, String> {
    let Some(text) = policy.annotation("expires") else { return Ok(None) };
    text.parse().map(Some).map_err(|_| {
        let text = text.escape_default();
        format!("@expires(\"{text}\") is not a time; write it like 2026-01-31T17:00:00Z (RFC 3339)")
    })
}

fn loud(policy: &Policy) -> Result<bool, String> {
    match policy.annotation("loud") {
        None => Ok(false),
        Some("true") => Ok(true),
        Some(_) => Err("@loud is either \"true\" or not there".to_owned()),
    }
}

fn allowed_wildcard(policy: &Policy) -> Result<Option<String>, String> {
    match policy.annotation("allow_wildcard") {
        None => Ok(None),
        Some(_) if policy.effect() == CedarEffect::Forbid => {
            Err("@allow_wildcard is for a permit; a forbid may reach as far as it likes".to_owned())
        }
        Some(why) if why.trim().is_empty() => {
            Err("@allow_wildcard says why, for example \"on-call\"".to_owned())
        }
        Some(why) => Ok(Some(why.to_owned())),
    }
}

/// Refuses a permit that gives too much by what it leaves open, unless it says why; and then warns of it.
fn wildcard(
    rule: &Rule,
    vocabulary: &Vocabulary,
    registry: &Registry,
) -> Result<Option<String>, PolicyError> {
    let Some((what, mend)) = excess(rule, vocabulary, registry) else { return Ok(None) };
    match &rule.wildcard {
        Some(why) => Ok(Some(format!("{}: {what}, because: {}", rule.place, one_line(why)))),
        None => Err(rule.refuse(&format!("{what}; {mend}, or say why with @allow_wildcard(\"…\")"))),
    }
}

/// What a permit gives too much of, and how it would give less. Every action, and `administer` for everyone, are too
/// much under a condition as well: whether it holds is nothing that this can judge.
fn excess(rule: &Rule, vocabulary: &Vocabulary, registry: &Registry) -> Option<(&'static str, &'static str)> {
    if !rule.permits() {
        return None;
    }
    let (everyone, everything) = (is_open(&rule.scope.principal), is_open(&rule.scope.resource));
    if rule.scope.all_actions() && reaches_protected(&rule.scope.resource, vocabulary, registry) {
        return Some(match (everyone, everything) {
            (true, true) => (
                "leaves principal, action and resource all open",
                "name the principal or the resource, and list the actions",
            ),
            (_, true) => ("gives every action on everything", "list the actions"),
            _ => ("gives every action on what is protected", "list the actions"),
        });
    }
    if everyone && rule.scope.admits(Action::Administer) {
        return Some(("gives `administer` to everyone", "name the principal"));
    }
    let unconditional = !rule.policy.has_non_scope_constraint();
    (everyone && everything && unconditional).then_some((
        "leaves principal and resource open without a condition",
        "name one of them, or add a `when`",
    ))
}

/// Whether the constraint names nobody and nothing: a type alone is as good as everyone of it.
const fn is_open(constraint: &Constraint) -> bool {
    matches!(constraint, Constraint::Any | Constraint::Is(_))
}

/// Whether a resource that is protected can satisfy the constraint.
fn reaches_protected(constraint: &Constraint, vocabulary: &Vocabulary, registry: &Registry) -> bool {
    match constraint {
        Constraint::Any | Constraint::Is(_) => true,
        Constraint::Eq(uid) | Constraint::In(uid) | Constraint::IsIn(_, uid) => {
            let name = environment_of(uid, vocabulary);
            let declared = registry.iter().find(|environment| Some(environment.name.as_str()) == name);
            declared.is_none_or(|environment| environment.protected)
        }
    }
}

/// The environment that an entity is, or that its id says it is in.
fn environment_of<'a>(uid: &'a EntityUid, vocabulary: &Vocabulary) -> Option<&'a str> {
    let id = uid.id().unescaped();
    if vocabulary.is_environment(uid) {
        Some(id)
    } else if vocabulary.is_secret(uid) {
        id.split_once(':').map(|(environment, _)| environment)
    } else {
        None
    }
}

/// Points out names that nothing bears: an environment that is not declared, an id that only looks like another.
fn unknown_names(rule: &Rule, vocabulary: &Vocabulary, registry: &Registry) -> Vec<String> {
    let mut warnings: Vec<String> = rule
        .policy
        .entity_literals()
        .iter()
        .filter_map(|uid| unknown_name(uid, vocabulary, registry))
        .map(|problem| format!("{}: {}", rule.place, one_line(&problem)))
        .collect();
    warnings.sort();
    warnings.dedup();
    warnings
}

fn unknown_name(uid: &EntityUid, vocabulary: &Vocabulary, registry: &Registry) -> Option<String> {
    let id = uid.id().unescaped();
    if id.trim() != id {
        return Some(format!("{uid} has a space at its end; ids are compared exactly"));
    }
    if vocabulary.is_secret(uid) && !id.contains(':') {
        return Some(format!("{uid} is no secret; write Secret::\"environment:name\""));
    }
    let name = environment_of(uid, vocabulary)?;
    let declared = || registry.iter().map(|environment| environment.name.as_str());
    if name == BROKER || declared().any(|declared| declared == name) {
        return None;
    }
    let hint = nearest(name, declared()).filter(|near| strsim::damerau_levenshtein(near, name) <= 3);
    let hint = hint.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
    Some(format!("environment `{name}` is not declared{hint}"))
}

fn nearest<'a>(text: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    names.into_iter().min_by_key(|name| strsim::damerau_levenshtein(name, text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::Environment;
    use crate::policy::SHIPPED;
    use crate::secret::EnvironmentName;

    fn registry() -> Registry {
        let declared = ["development", "production"].map(|name| {
            let mut environment = Environment::sealed(EnvironmentName::parse(name).unwrap());
            environment.protected = name == "production";
            environment
        });
        Registry::new(declared).unwrap()
    }

    fn files(files: &[(&str, &str)]) -> Result<RuleSet, PolicyError> {
        let schema = SHIPPED.iter().find(|(name, _)| *name == "schema.cedarschema").unwrap();
        let texts = std::iter::once(schema).chain(files);
        let texts = texts.map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        RuleSet::load(&PolicySource::Texts(texts), &registry())
    }

    fn load(text: &str) -> Result<RuleSet, PolicyError> {
        files(&[("a.cedar", text)])
    }

    fn problem(text: &str) -> String {
        let error = load(text).err().unwrap_or_else(|| panic!("accepted: {text}"));
        let message = error.to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    }

    fn warnings(text: &str) -> Vec<String> {
        load(text).unwrap_or_else(|error| panic!("{error}")).warnings
    }

    const OK: &str = r#"@id("ok") permit (principal in Group::"g", action == Action::"read", resource);"#;

    #[test]
    fn the_shipped_set_is_right_and_warns_of_its_one_wildcard() {
        let set = RuleSet::load(&PolicySource::shipped(), &registry()).unwrap();
        assert_eq!(set.rules.len(), 30);
        let (undeclared, others): (Vec<_>, Vec<_>) = set
            .warnings
            .iter()
            .partition(|warning| warning.contains("environment `staging` is not declared"));
        assert!(!undeclared.is_empty());
        assert_eq!(others.len(), 1, "{others:?}");
        assert!(
            others[0].contains(
                "policy `administrators-do-all`: gives every action on everything, because: someone"
            )
        );
    }

    #[test]
    fn a_rule_is_what_its_annotations_say() {
        let set = load(
            r#"
            // about nothing
            @id("a") @approvals("2") @expires("2030-01-01T00:00:00+02:00") @loud("true")
            permit (principal in Group::"g", action == Action::"delete", resource);
            @id("b") forbid (principal, action, resource) when { context has reason };
            "#,
        )
        .unwrap();
        let [a, b] = set.rules.as_slice() else { panic!("two rules") };
        assert_eq!((&*a.id, a.approvals, a.loud, a.reads_context), ("a", Some(2), true, false));
        assert_eq!(a.expires.unwrap().to_string(), "2029-12-31T22:00:00Z");
        assert_eq!(a.place, "a.cedar:3:13, policy `a`");
        assert_eq!((&*b.id, b.permits(), b.reads_context), ("b", false, true));
        assert_eq!(b.place, "a.cedar:5:13, policy `b`");
        assert!(set.rule(&PolicyId::new("b")).is_some());
        assert!(set.rule(&PolicyId::new("policy0")).is_none());
    }

    #[test]
    fn cedar_mistakes_are_placed_with_a_mend() {
        for (text, place, said) in [
            ("", "a.cedar:1:1: ", "there is no policy in this file"),
            ("// nothing but a comment\n", "a.cedar:1:1: ", "there is no policy in this file"),
            ("@id(\"x\")\npermit (principal, action resource);", "a.cedar:2:", "unexpected token"),
            ("@id(\"x\") permit (principal in Group::\"g\", action", "a.cedar:1:", "unexpected end of input"),
            (
                "@id(\"x\")\npermit (principal in Group::\"g\", action == Action::\"raed\", resource);",
                "a.cedar:2:",
                "policy `x`: unrecognized action `Action::\"raed\"`; did you mean `Action::\"read\"`?",
            ),
            (
                "@id(\"x\") permit (principal in Grup::\"g\", action == Action::\"read\", resource);",
                "a.cedar:1:",
                "policy `x`: unrecognized entity type `Grup`; did you mean `Group`?",
            ),
            (
                "@id(\"x\") permit (principal in Group::\"g\", action == Action::\"read\", resource is Secret)\n\
                 when { resource.nam == \"database\" };",
                "a.cedar:2:8, policy `x`: ",
                "attribute `nam` on entity type `Secret` not found",
            ),
            (
                "@id(\"x\") permit (principal in Group::\"g\", action == Action::\"read\", resource)\n\
                 when { context.reason == \"x\" };",
                "a.cedar:2:8, policy `x`: ",
                "optional attribute `reason`",
            ),
            (
                "@id(\"x\") permit (principal in Group::\"g\", action == Action::\"read\", resource)\n\
                 when { principal.getTag(\"team\") == \"x\" };",
                "a.cedar:2:8, policy `x`: ",
                "access to tag",
            ),
            (
                "@id(\"x\") permit (principal in Group::\"g\", action == Action::\"read\", resource)\n\
                 when { Environment::\"production\".protected };",
                "a.cedar:2:8, policy `x`: ",
                "read attributes and tags of `principal` and `resource` only",
            ),
            (
                "\n@id(\"x\") permit (principal == ?principal, action, resource);",
                "a.cedar:2:1: ",
                "is a template",
            ),
        ] {
            let message = problem(text);
            assert!(message.starts_with(place), "{place}: {message}");
            assert!(message.contains(said), "{said}: {message}");
        }
    }

    #[test]
    fn several_mistakes_are_counted_and_the_first_is_told() {
        let message = problem(
            r#"
            @id("a") permit (principal in Group::"g", action == Action::"raed", resource);
            @id("b") permit (principal in Group::"g", action == Action::"wirte", resource);
            "#,
        );
        assert!(message.contains("policy `a`") && message.ends_with("(and 1 more like it)"), "{message}");
    }

    #[test]
    fn house_rules_are_placed_with_a_mend() {
        let head = "permit (principal in Group::\"g\", action == Action::\"read\", resource);";
        for (annotations, said) in [
            ("", "a.cedar:1:1: a policy has no @id"),
            ("@id(\"\")", "is not 1 to 64 of"),
            ("@id(\"a b\")", "@id(\"a b\") is not"),
            ("@id(\"\u{440}ead\")", "@id(\"\\u{440}ead\") is not"),
            ("@id(\"x\") @aprovals(\"2\")", "unknown annotation @aprovals; did you mean @approvals?"),
            ("@id(\"x\") @approvals(\"0\")", "policy `x`: @approvals(\"0\") asks for nothing"),
            ("@id(\"x\") @approvals(\"two\")", "is not a number from 1 to 255"),
            ("@id(\"x\") @approvals(\"-1\")", "is not a number from 1 to 255"),
            ("@id(\"x\") @approvals(\"+1\")", "is not a number from 1 to 255"),
            ("@id(\"x\") @approvals(\"01\")", "is not a number from 1 to 255"),
            ("@id(\"x\") @approvals(\"256\")", "is not a number from 1 to 255"),
            ("@id(\"x\") @approvals", "is not a number from 1 to 255"),
            ("@id(\"x\") @expires(\"2026-01-01\")", "is not a time; write it like"),
            ("@id(\"x\") @expires(\"tomorrow\")", "is not a time; write it like"),
            ("@id(\"x\") @loud(\"yes\")", "@loud is either"),
            ("@id(\"x\") @allow_wildcard(\" \")", "@allow_wildcard says why"),
        ] {
            let message = problem(format!("{annotations} {head}").trim_start());
            assert!(message.contains(said), "{said}: {message}");
        }
        for annotation in ["@approvals(\"2\")", "@allow_wildcard(\"why\")"] {
            let message = problem(&format!("@id(\"x\") {annotation} forbid (principal, action, resource);"));
            assert!(message.contains("is for a permit"), "{message}");
        }
    }

    #[test]
    fn ids_are_unique_across_files() {
        let second = format!("\n{OK}");
        let error = files(&[("a.cedar", OK), ("b.cedar", second.as_str())]).err().unwrap().to_string();
        assert_eq!(
            error,
            "b.cedar:2:1, policy `ok`: the id is taken by a.cedar:1:1, policy `ok`; ids are unique across files"
        );
    }

    #[test]
    fn a_wildcard_needs_a_reason_and_is_pointed_out() {
        for (head, said) in [
            ("(principal, action, resource)", "leaves principal, action and resource all open"),
            ("(principal in Group::\"g\", action, resource)", "gives every action on everything"),
            (
                "(principal is User, action, resource is Secret)",
                "leaves principal, action and resource all open",
            ),
            ("(principal in Group::\"g\", action, resource is Secret)", "gives every action on everything"),
            (
                "(principal, action == Action::\"read\", resource)",
                "leaves principal and resource open without a condition",
            ),
            (
                "(principal is User, action in [Action::\"read\"], resource is Secret)",
                "leaves principal and resource open without a condition",
            ),
            (
                "(principal, action == Action::\"administer\", resource == Environment::\"claviger\")",
                "gives `administer` to everyone",
            ),
            (
                "(principal is Workload, action == Action::\"administer\", resource in \
                 Environment::\"development\") when { resource.environment == \"development\" }",
                "gives `administer` to everyone",
            ),
            (
                "(principal, action, resource in Environment::\"development\")",
                "gives `administer` to everyone",
            ),
            (
                "(principal in Group::\"g\", action, resource in Environment::\"production\")",
                "gives every action on what is protected",
            ),
            (
                "(principal in Group::\"g\", action, resource == Secret::\"production:database\")",
                "gives every action on what is protected",
            ),
            (
                "(principal in Group::\"g\", action, resource == Environment::\"claviger\")",
                "gives every action on what is protected",
            ),
        ] {
            let message = problem(&format!("@id(\"x\") permit {head};"));
            assert!(message.contains(&format!("policy `x`: {said}; ")), "{message}");
            assert!(message.ends_with(", or say why with @allow_wildcard(\"…\")"), "{message}");
            let warned = warnings(&format!("@id(\"x\") @allow_wildcard(\"on call\") permit {head};"));
            assert!(
                warned.iter().any(|warning| warning.contains(&format!("{said}, because: on call"))),
                "{warned:?}"
            );
        }
        for fine in [
            "permit (principal in Group::\"g\", action, resource in Environment::\"development\")",
            "permit (principal, action == Action::\"read\", resource in Environment::\"production\")",
            "permit (principal, action == Action::\"read\", resource) unless { resource.protected }",
            "permit (principal in Group::\"g\", action == Action::\"read\", resource)",
            "permit (principal in Group::\"g\", action == Action::\"administer\", resource)",
            "forbid (principal, action, resource)",
            "forbid (principal, action == Action::\"administer\", resource)",
        ] {
            assert_eq!(warnings(&format!("@id(\"x\") {fine};")), Vec::<String>::new(), "{fine}");
        }
    }

    #[test]
    fn every_action_by_name_is_every_action() {
        let all: Vec<&Action> = Action::ALL.iter().collect();
        let head = format!("(principal in Group::\"g\", action in [{}], resource)", named(&all));
        assert!(problem(&format!("@id(\"x\") permit {head};")).contains("gives every action on everything"));
    }

    #[test]
    fn all_actions_but_one_for_everyone_are_too_many() {
        for left_out in Action::ALL {
            let others: Vec<&Action> = Action::ALL.iter().filter(|action| *action != left_out).collect();
            assert_eq!(others.len(), 10);
            let policy = format!("@id(\"x\") permit (principal, action in [{}], resource);", named(&others));
            let said = match left_out {
                Action::Administer => "leaves principal and resource open without a condition",
                _ => "gives `administer` to everyone",
            };
            let message = problem(&policy);
            assert!(message.contains(said), "{message}");
        }
    }

    fn named(actions: &[&Action]) -> String {
        let named: Vec<String> = actions.iter().map(|action| format!("Action::\"{action}\"")).collect();
        named.join(", ")
    }

    #[test]
    fn names_that_nothing_bears_are_pointed_out() {
        for (literal, said) in [
            (
                "resource in Environment::\"prodution\"",
                "environment `prodution` is not declared; did you mean `production`?",
            ),
            (
                "resource in Environment::\"Production\"",
                "environment `Production` is not declared; did you mean `production`?",
            ),
            ("resource in Environment::\"elsewhere\"", "environment `elsewhere` is not declared"),
            ("resource == Secret::\"elsewhere:database\"", "environment `elsewhere` is not declared"),
            ("resource == Secret::\"database\"", "write Secret::\"environment:name\""),
        ] {
            let warned = warnings(&format!(
                "@id(\"x\") permit (principal in Group::\"g\", action == Action::\"read\", {literal});"
            ));
            assert_eq!(warned.len(), 1, "{warned:?}");
            assert!(
                warned[0].starts_with("a.cedar:1:1, policy `x`: ") && warned[0].contains(said),
                "{warned:?}"
            );
        }
        let warned = warnings(&OK.replace("\"g\"", "\"g \""));
        assert!(warned[0].contains("Group::\"g \" has a space at its end"), "{warned:?}");
    }
}
