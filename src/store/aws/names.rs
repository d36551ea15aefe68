//! How a secret of one environment is called in AWS, and back.
//!
//! A template is read so that no AWS name can belong to two environments: where `{environment}` stands beside
//! something that could be part of an environment's name, it is refused.
//!
//! ```text
//! {environment}/{name}      production/database    ok: no environment's name holds a slash
//! {environment}-{name}      pr-1-db                refused: `1-db` of `pr`, or `db` of `pr-1`?
//! {name}                    database               ok where the account is the environment's alone
//! ```

use crate::secret::{EnvironmentName, SecretId, SecretName};
use crate::store::StoreError;

/// What the configuration gets that names no template.
pub(super) const DEFAULT_TEMPLATE: &str = "{environment}/{name}";

const NAME: &str = "{name}";
const ENVIRONMENT: &str = "{environment}";
/// The longest name of a secret, in characters (AWS Secrets Manager, `CreateSecret`, `Name`).
const LONGEST: usize = 512;

/// A template with its environment filled in: what stands before a secret's name, and what after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    before: String,
    after: String,
}

impl Names {
    /// Reads a template for one environment.
    ///
    /// # Errors
    /// [`StoreError::Invalid`], naming what is wrong with the template.
    pub(super) fn parse(template: &str, environment: &EnvironmentName) -> Result<Self, StoreError> {
        let refuse = |problem: &str| {
            let shown: String = template.escape_default().take(96).collect();
            Err(StoreError::Invalid(format!(
                "environments.{environment}.aws.name_template = \"{shown}\": {problem}"
            )))
        };
        if template.matches(NAME).count() != 1 {
            return refuse("must hold `{name}` exactly once");
        }
        if template.matches(ENVIRONMENT).count() > 1 {
            return refuse("must hold `{environment}` at most once");
        }
        if !template.replace(NAME, "").replace(ENVIRONMENT, "").chars().all(is_permitted) {
            return refuse(
                "beside `{name}` and `{environment}`, only A-Z, a-z, 0-9 and /_+=.@- are permitted",
            );
        }
        if is_ambiguous(template) {
            return refuse(
                "`{environment}` must be separated from what is around it by a character that no environment's name \
                 holds, for example a slash",
            );
        }
        let filled = template.replace(ENVIRONMENT, environment.as_str());
        match filled.split_once(NAME) {
            Some((before, after)) => Ok(Self { before: before.to_owned(), after: after.to_owned() }),
            None => refuse("must hold `{name}` exactly once"),
        }
    }

    /// What the secret is called in AWS.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] where that is longer than AWS permits.
    pub(super) fn in_aws(&self, id: &SecretId) -> Result<String, StoreError> {
        let name = format!("{}{}{}", self.before, id.name, self.after);
        if name.len() > LONGEST {
            return Err(StoreError::Invalid(format!(
                "secret `{}`: its name in AWS would be {} characters long; at most {LONGEST} are permitted",
                id.name,
                name.len()
            )));
        }
        Ok(name)
    }

    /// Which secret of this environment AWS calls so; `None` where it is none of this environment's.
    pub(super) fn secret_called(&self, name: &str) -> Option<SecretName> {
        let inner = name.strip_prefix(self.before.as_str())?.strip_suffix(self.after.as_str())?;
        SecretName::parse(inner).ok()
    }

    /// What the AWS names of all secrets start with whose own name starts with `prefix`.
    pub(super) fn prefix(&self, prefix: &str) -> String {
        format!("{}{prefix}", self.before)
    }
}

/// What a secret's name may hold (AWS Secrets Manager, `CreateSecret`, `Name`).
pub(super) fn is_permitted(c: char) -> bool {
    c.is_ascii_alphanumeric() || "/_+=.@-".contains(c)
}

/// Whether the end of the environment's name, towards the secret's, can't be told.
fn is_ambiguous(template: &str) -> bool {
    let Some((left, right)) = template.split_once(ENVIRONMENT) else { return false };
    let neighbour = if right.contains(NAME) { right.chars().next() } else { left.chars().next_back() };
    neighbour.is_none_or(|c| "{}-".contains(c) || c.is_ascii_lowercase() || c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned};
    use proptest::prelude::*;

    fn environment(name: &str) -> EnvironmentName {
        EnvironmentName::parse(name).unwrap()
    }

    fn names(template: &str, name: &str) -> Names {
        Names::parse(template, &environment(name)).unwrap()
    }

    #[test]
    fn templates_lead_there_and_back() {
        for (template, expected) in [
            (DEFAULT_TEMPLATE, "pr-1/db/main"),
            ("team/{environment}/app/{name}", "team/pr-1/app/db/main"),
            ("{name}@{environment}", "db/main@pr-1"),
            ("{name}.{environment}/x", "db/main.pr-1/x"),
            ("{name}", "db/main"),
        ] {
            let names = names(template, "pr-1");
            let id = SecretId::parse("pr-1", "db/main").unwrap();
            assert_eq!(names.in_aws(&id).unwrap(), expected);
            assert_eq!(names.secret_called(expected), Some(id.name));
        }
    }

    #[test]
    fn templates_that_could_mean_two_things_are_refused() {
        for bad in [
            "",
            "fixed",
            "{environment}",
            "{environment}{name}",
            "{name}{environment}",
            "{environment}-{name}",
            "{environment}x/{name}",
            "{name}-{environment}",
            "{environment}/{environment}/{name}",
            "{name}/{name}",
            "{environment}/{name} ",
            "{environment}/{other}/{name}",
            "{environment}/é{name}",
            "arn:aws:{name}",
        ] {
            let error = Names::parse(bad, &environment("pr-1")).unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidArgument, "{bad:?}");
        }
    }

    #[test]
    fn names_of_others_are_not_ours() {
        let names = names(DEFAULT_TEMPLATE, "pr-1");
        for foreign in ["pr-1", "pr-1/", "pr-12/db", "production/db", "db", "pr-1//db", "pr-1/a b"] {
            assert_eq!(names.secret_called(foreign), None, "{foreign:?}");
        }
    }

    #[test]
    fn a_name_that_aws_would_refuse_is_refused_here() {
        let id = SecretId::parse("pr-1", &"x".repeat(512)).unwrap();
        assert!(names(DEFAULT_TEMPLATE, "pr-1").in_aws(&id).is_err());
        assert!(names("{name}", "pr-1").in_aws(&id).is_ok());
    }

    proptest! {
        #[test]
        fn no_aws_name_belongs_to_two_environments(
            one in "[a-z0-9][a-z0-9-]{0,5}[a-z0-9]", other in "[a-z0-9][a-z0-9-]{0,5}[a-z0-9]",
            name in "[a-z0-9-]{1,6}([/.@][a-z0-9-]{1,6}){0,2}",
            template in prop_oneof![
                Just("{environment}/{name}"), Just("a{environment}.{name}"), Just("{name}@{environment}"),
            ],
        ) {
            prop_assume!(one != other);
            let Ok(id) = SecretId::parse(&one, &name) else { return Ok(()) };
            let in_aws = names(template, &one).in_aws(&id).unwrap();
            prop_assert_eq!(names(template, &one).secret_called(&in_aws), Some(id.name));
            prop_assert_eq!(names(template, &other).secret_called(&in_aws), None);
        }
    }
}
