//! A decision taken apart: each policy that could have a say, evaluated by itself.

use std::sync::Arc;

use cedar_policy::{Authorizer, PolicySet};

use super::entities::Asked;
use super::rules::Rule;
use super::source::one_line;
use super::{Decision, Effect};

/// A decision with everything that had a say in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// Yes, no, or not alone.
    pub effect: Effect,
    /// Whether a policy failed to evaluate, which denies.
    pub evaluation_failed: bool,
    /// Every policy whose head fits the question, in the order of the ids. No other can apply.
    pub policies: Vec<ExplainedPolicy>,
    /// How many policies are in force altogether.
    pub in_force: usize,
    /// Whether the decision was remembered from before; one that may depend on the context never is.
    pub cached: bool,
    /// The generation of the policies.
    pub generation: u64,
}

/// A policy whose head fits a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExplainedPolicy {
    /// Its id.
    pub id: Arc<str>,
    /// The name of its file.
    pub file: Arc<str>,
    /// `permit` or `forbid`.
    pub effect: &'static str,
    /// The approvals that it asks for.
    pub approvals: Option<u8>,
    /// Whether its conditions hold.
    pub satisfied: bool,
    /// Whether it is one of those that decided.
    pub decided: bool,
    /// Why its conditions can't be evaluated.
    pub error: Option<String>,
}

impl ExplainedPolicy {
    pub(super) fn of(rule: &Rule, asked: &Asked, decision: &Decision) -> Self {
        let (satisfied, error) = match alone(rule, asked) {
            Ok(satisfied) => (satisfied, None),
            Err(problem) => (false, Some(one_line(&problem))),
        };
        Self {
            id: Arc::clone(&rule.id),
            file: Arc::clone(&rule.file),
            effect: if rule.permits() { "permit" } else { "forbid" },
            approvals: rule.approvals,
            satisfied,
            decided: decision.policies.contains(&rule.id),
            error,
        }
    }
}

/// Whether one policy's conditions hold, whatever the others say.
fn alone(rule: &Rule, asked: &Asked) -> Result<bool, String> {
    let policies = PolicySet::from_policies([rule.policy.clone()]).map_err(|error| error.to_string())?;
    let response = Authorizer::new().is_authorized(&asked.request, &policies, &asked.entities);
    let diagnostics = response.diagnostics();
    match diagnostics.errors().next() {
        Some(error) => Err(error.to_string()),
        None => Ok(diagnostics.reason().next().is_some()),
    }
}
