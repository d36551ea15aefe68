//! The decision itself: the current rules, what was decided before, and how rules give way to newer ones.
//!
//! ```text
//! authorize ─▶ decided before? ─ yes ─────────────────────────────▶ Decision ─▶ Grant or Refusal
//!                   │ no                                                ▲
//!                   ▼                                                   │
//!              the rules whose head fits ─▶ their Cedar policy set ─▶ evaluate; where they are nothing but
//!              (slice.rs)                   (built once per such list)          heads, once per such list
//! ```
//!
//! All of this hangs on one [`State`], replaced as a whole: whoever holds the old one finishes with the old rules, and
//! no decision outlives the rules that made it. A hit takes no lock that others wait for.
//!
//! INVARIANT: whatever goes wrong denies. A policy that fails to evaluate denies even beside a permit, because a
//! `forbid` that could not be evaluated might have forbidden.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::{ArcSwap, Guard};
use cedar_policy::{AuthorizationError, Authorizer, Decision as CedarDecision, PolicySet, Response};
use jiff::Timestamp;
use moka::sync::Cache;

use super::bounds;
use super::entities::{Asked, Question, Sides};
use super::explain::{ExplainedPolicy, Explanation};
use super::rules::{Rule, RuleSet};
use super::slice::Index;
use super::{Action, Context, Decision, Effect, Grant, PolicyError, PolicySource, Refusal, Resource};
use crate::clock::SharedClock;
use crate::environment::Registry;
use crate::identity::{Fingerprint, Principal};

/// How many decisions are remembered.
const MAX_DECISIONS: u64 = 32_768;
/// How many policies the remembered policy sets hold together; more than the largest set holds alone.
const MAX_SLICED_POLICIES: u64 = 16_384;

/// The current policies. Shared by an `Arc`; answers while it reloads.
pub struct Policies {
    source: PolicySource,
    registry: Registry,
    clock: SharedClock,
    state: ArcSwap<State>,
    /// Held by whoever reads the source, so that what was read last is also what is kept.
    reloading: Mutex<()>,
    /// Held only while one state takes the place of another.
    replacing: Mutex<()>,
}

/// What a reload brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reloaded {
    /// The new generation.
    pub generation: u64,
    /// How many policies there are now, expired ones included.
    pub policies: usize,
    /// What is legal and worth a look.
    pub warnings: Vec<String>,
}

impl Policies {
    /// Reads, checks and validates a policy set. Reads files: not for an asynchronous task.
    ///
    /// # Errors
    /// [`PolicyError`], naming file, line, column and policy as far as they are known.
    pub fn load(source: PolicySource, registry: Registry, clock: SharedClock) -> Result<Self, PolicyError> {
        let rules = bounds::with_room(|| RuleSet::load(&source, &registry))?;
        let state = State::new(Arc::new(rules), 1, clock.now());
        Ok(Self {
            source,
            registry,
            clock,
            state: ArcSwap::from_pointee(state),
            reloading: Mutex::new(()),
            replacing: Mutex::new(()),
        })
    }

    /// May `principal` do `action` to `resource`?
    ///
    /// # Errors
    /// [`Refusal`]: no, or not without approvals.
    pub fn authorize(
        &self,
        principal: &Arc<Principal>,
        action: Action,
        resource: &Resource,
        context: &Context,
    ) -> Result<Grant, Refusal> {
        let verdict = self.judge(Question { principal, action, resource, context });
        let decision = Arc::clone(&verdict.decision);
        match decision.effect {
            Effect::Allow => {
                Ok(Grant { principal: Arc::clone(principal), action, resource: resource.clone(), decision })
            }
            Effect::Deny | Effect::ApprovalRequired(_) => {
                Err(Refusal::new(principal, action, resource, decision))
            }
        }
    }

    /// Why [`authorize`](Self::authorize) answers as it does: the same decision, made anew, with each policy that had
    /// a say in it. Grants nothing and is not logged as loud.
    #[must_use]
    pub fn explain(
        &self,
        principal: &Arc<Principal>,
        action: Action,
        resource: &Resource,
        context: &Context,
    ) -> Explanation {
        let state = self.current();
        let question = Question { principal, action, resource, context };
        let cached = state.decisions.contains_key(&Key::of(question));
        let sides = state.rules.vocabulary.sides(question);
        let (decision, mut policies) = match state.rules.vocabulary.ask(question, &sides, &self.registry) {
            Err(problem) => (Verdict::impossible(question, &problem).decision, Vec::new()),
            Ok(asked) => {
                let numbers = state.candidates(action, &sides);
                let decision = match state.slice(numbers.clone()) {
                    Ok(slice) => state.verdict(&slice.put(&asked)).decision,
                    Err(problem) => Verdict::impossible(question, &problem).decision,
                };
                let numbers = numbers.into_iter();
                let rules = numbers.filter_map(|number| state.rule(number));
                let policies = rules.map(|rule| ExplainedPolicy::of(rule, &asked, &decision)).collect();
                (decision, policies)
            }
        };
        policies.sort_by(|one: &ExplainedPolicy, other| one.id.cmp(&other.id));
        let Decision { effect, evaluation_failed, .. } = *decision;
        let (in_force, generation) = (state.active, state.generation);
        Explanation { effect, evaluation_failed, policies, in_force, cached, generation }
    }

    /// Reads the source again. Reads files: not for an asynchronous task.
    ///
    /// # Errors
    /// As [`load`](Self::load); the policies before stay in force.
    pub fn reload(&self) -> Result<Reloaded, PolicyError> {
        let _reading = locked(&self.reloading);
        let rules = Arc::new(bounds::with_room(|| RuleSet::load(&self.source, &self.registry))?);
        let state = self.replace(rules);
        Ok(Reloaded {
            generation: state.generation,
            policies: state.rules.rules.len(),
            warnings: state.warnings.clone(),
        })
    }

    /// Counts up with every reload that succeeds, and whenever a policy expires. Starts with 1.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.current().generation
    }

    /// What of the current policies is legal and worth a look: expired ones, environments that are not declared,
    /// wildcards, and what Cedar's validator finds odd.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        self.current().warnings.clone()
    }

    /// How many policies there are, expired ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.current().rules.rules.len()
    }

    /// Never: a set without policies is refused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The decision, without a grant and without logging.
    pub(super) fn decide(&self, question: Question<'_>) -> Arc<Decision> {
        self.current().decide(question, &self.registry).decision
    }

    fn judge(&self, question: Question<'_>) -> Verdict {
        let verdict = self.current().decide(question, &self.registry);
        for policy in &*verdict.loud {
            tracing::warn!(
                principal = %question.principal,
                action = %question.action,
                resource = %question.resource,
                policy = &**policy,
                decision = verdict.decision.effect.as_str(),
                reason_given = question.context.reason.is_some(),
                "decided by a loud policy"
            );
        }
        verdict
    }

    /// The current state, in which no policy has outlived its expiry.
    fn current(&self) -> Guard<Arc<State>> {
        let state = self.state.load();
        if !state.outdated(&self.clock) {
            return state;
        }
        drop(state);
        self.expire();
        self.state.load()
    }

    fn expire(&self) {
        let _replacing = locked(&self.replacing);
        let state = self.state.load_full();
        if state.outdated(&self.clock) {
            tracing::warn!(generation = state.generation + 1, "a policy expired");
            self.state.store(Arc::new(state.successor(Arc::clone(&state.rules), self.clock.now())));
        }
    }

    fn replace(&self, rules: Arc<RuleSet>) -> Arc<State> {
        let _replacing = locked(&self.replacing);
        let state = Arc::new(self.state.load().successor(rules, self.clock.now()));
        self.state.store(Arc::clone(&state));
        state
    }
}

impl fmt::Debug for Policies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.load();
        f.debug_struct("Policies")
            .field("generation", &state.generation)
            .field("policies", &state.rules.rules.len())
            .finish_non_exhaustive()
    }
}

fn locked(mutex: &Mutex<()>) -> MutexGuard<'_, ()> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One set of rules at one time, with what was decided by it.
struct State {
    generation: u64,
    rules: Arc<RuleSet>,
    /// Rules in force.
    index: Index,
    active: usize,
    warnings: Vec<String>,
    /// When the first of the rules in force expires.
    next_expiry: Option<Timestamp>,
    /// Policy sets by the numbers of their rules: callers with the same roles share one.
    slices: Cache<Vec<u32>, Arc<Slice>>,
    decisions: Cache<Key, Verdict>,
}

/// The rules that a question is put to.
struct Slice {
    policies: PolicySet,
    /// Whether one of them may look at the context, so that the decision holds for this request only.
    reads_context: bool,
    /// Whether one of them has a condition beside its head.
    conditional: bool,
    /// How many of them decide where all of them hold: the forbids, and where there are none, the permits.
    deciding: usize,
    /// Cedar's verdict where there are no conditions.
    ///
    /// INVARIANT: all questions that come to this slice fit all of its heads, so that one such verdict is every one's.
    settled: OnceLock<Verdict>,
}

impl Slice {
    fn of(rules: &[&Rule]) -> Result<Self, String> {
        let policies = PolicySet::from_policies(rules.iter().map(|rule| rule.policy.clone()))
            .map_err(|error| error.to_string())?;
        let permits = rules.iter().filter(|rule| rule.permits()).count();
        let forbids = rules.len() - permits;
        Ok(Self {
            policies,
            reads_context: rules.iter().any(|rule| rule.reads_context),
            conditional: rules.iter().any(|rule| rule.policy.has_non_scope_constraint()),
            deciding: if forbids > 0 { forbids } else { permits },
            settled: OnceLock::new(),
        })
    }

    fn put(&self, asked: &Asked) -> Response {
        Authorizer::new().is_authorized(&asked.request, &self.policies, &asked.entities)
    }

    /// Whether Cedar found every head to fit, as far as an answer shows it.
    fn all_hold(&self, response: &Response) -> bool {
        let diagnostics = response.diagnostics();
        diagnostics.errors().next().is_none() && diagnostics.reason().count() == self.deciding
    }
}

/// Whether a rule in force gives anyone a say over the broker itself, going by heads alone.
fn administrable(rules: &RuleSet, now: Timestamp) -> bool {
    let broker = rules.vocabulary.resource(&Resource::Broker);
    rules.rules.iter().any(|rule| {
        let scope = &rule.scope;
        let in_force = rule.expires.is_none_or(|at| at > now);
        in_force && rule.permits() && scope.admits(Action::Administer) && scope.resource.holds(&broker)
    })
}

/// What a decision that does not depend on the context depends on, beside the state that remembers it.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    principal: Fingerprint,
    action: Action,
    resource: Resource,
}

impl Key {
    fn of(question: Question<'_>) -> Self {
        Self {
            principal: question.principal.fingerprint(),
            action: question.action,
            resource: question.resource.clone(),
        }
    }
}

/// A decision, and which of the deciding policies are loud.
#[derive(Clone)]
struct Verdict {
    decision: Arc<Decision>,
    loud: Arc<[Arc<str>]>,
}

impl Verdict {
    fn new<'a>(effect: Effect, deciding: impl Iterator<Item = &'a Rule>, evaluation_failed: bool) -> Self {
        let deciding: Vec<&Rule> = deciding.collect();
        let mut policies: Vec<_> = deciding.iter().map(|rule| Arc::clone(&rule.id)).collect();
        policies.sort();
        let loud: Arc<[_]> =
            deciding.iter().filter(|rule| rule.loud).map(|rule| Arc::clone(&rule.id)).collect();
        Self { decision: Arc::new(Decision { effect, policies, evaluation_failed }), loud }
    }

    /// No, because the question can't even be put.
    fn impossible(question: Question<'_>, problem: &str) -> Self {
        tracing::error!(
            principal = %question.principal,
            action = %question.action,
            resource = %question.resource,
            problem,
            "denied: the question could not be put to the policies"
        );
        Self::new(Effect::Deny, std::iter::empty(), true)
    }
}

impl State {
    fn new(rules: Arc<RuleSet>, generation: u64, now: Timestamp) -> Self {
        let mut index = Index::default();
        let mut warnings = rules.warnings.clone();
        let (mut active, mut next_expiry) = (0, None::<Timestamp>);
        for (number, rule) in (0..).zip(&rules.rules) {
            match rule.expires {
                Some(at) if at <= now => warnings.push(format!("{}: expired at {at}", rule.place)),
                expires => {
                    index.insert(number, &rule.scope);
                    active += 1;
                    next_expiry = [next_expiry, expires].into_iter().flatten().min();
                }
            }
        }
        if !administrable(&rules, now) {
            warnings.push(
                "no policy lets anyone administer the broker: no tokens, no keys, no reload by hand until one does"
                    .to_owned(),
            );
        }
        let slices = Cache::builder()
            .max_capacity(MAX_SLICED_POLICIES)
            .weigher(|numbers: &Vec<u32>, _: &Arc<Slice>| {
                u32::try_from(numbers.len() + 1).unwrap_or(u32::MAX)
            })
            .build();
        let decisions = Cache::new(MAX_DECISIONS);
        Self { generation, rules, index, active, warnings, next_expiry, slices, decisions }
    }

    fn successor(&self, rules: Arc<RuleSet>, now: Timestamp) -> Self {
        Self::new(rules, self.generation + 1, now)
    }

    fn outdated(&self, clock: &SharedClock) -> bool {
        self.next_expiry.is_some_and(|at| at <= clock.now())
    }

    fn decide(&self, question: Question<'_>, registry: &Registry) -> Verdict {
        let key = Key::of(question);
        if let Some(verdict) = self.decisions.get(&key) {
            return verdict;
        }
        let sides = self.rules.vocabulary.sides(question);
        let (verdict, lasting) = self
            .evaluate(question, &sides, registry)
            .unwrap_or_else(|problem| (Verdict::impossible(question, &problem), false));
        if lasting {
            self.decisions.insert(key, verdict.clone());
        }
        verdict
    }

    /// The verdict, and whether it holds for the same question at another time.
    fn evaluate(
        &self,
        question: Question<'_>,
        sides: &Sides,
        registry: &Registry,
    ) -> Result<(Verdict, bool), String> {
        let slice = self.slice(self.candidates(question.action, sides))?;
        let vocabulary = &self.rules.vocabulary;
        let verdict = if slice.conditional {
            self.verdict(&slice.put(&vocabulary.ask(question, sides, registry)?))
        } else if let Some(settled) = slice.settled.get() {
            settled.clone()
        } else {
            let response = slice.put(&vocabulary.ask_heads(question, sides)?);
            let verdict = self.verdict(&response);
            if slice.all_hold(&response) {
                let _ = slice.settled.set(verdict.clone());
            }
            verdict
        };
        let lasting = !slice.reads_context && !verdict.decision.evaluation_failed;
        Ok((verdict, lasting))
    }

    /// The numbers of the rules in force whose head fits, sorted.
    fn candidates(&self, action: Action, sides: &Sides) -> Vec<u32> {
        let Sides { principal, resource } = sides;
        let fits = |number: &u32| {
            self.rule(*number).is_some_and(|rule| rule.scope.fits(principal, action, resource))
        };
        let mut numbers: Vec<u32> = self.index.candidates(principal, resource).filter(fits).collect();
        numbers.sort_unstable();
        numbers
    }

    fn rule(&self, number: u32) -> Option<&Rule> {
        self.rules.rules.get(usize::try_from(number).ok()?)
    }

    fn slice(&self, numbers: Vec<u32>) -> Result<Arc<Slice>, String> {
        if let Some(slice) = self.slices.get(&numbers) {
            return Ok(slice);
        }
        let rules: Vec<&Rule> = numbers.iter().filter_map(|number| self.rule(*number)).collect();
        let slice = Arc::new(Slice::of(&rules)?);
        self.slices.insert(numbers, Arc::clone(&slice));
        Ok(slice)
    }

    /// Cedar's answer, with the house's rules on top: an error denies, and a permit may ask for approvals.
    fn verdict(&self, response: &Response) -> Verdict {
        let diagnostics = response.diagnostics();
        let determining: Vec<&Rule> = diagnostics.reason().filter_map(|id| self.rules.rule(id)).collect();
        let denied = response.decision() == CedarDecision::Deny;
        if diagnostics.errors().next().is_some() {
            let failed =
                diagnostics.errors().filter_map(|AuthorizationError::PolicyEvaluationError(error)| {
                    self.rules.rule(error.policy_id())
                });
            let forbidding = determining.into_iter().filter(|_| denied);
            return Verdict::new(Effect::Deny, failed.chain(forbidding), true);
        }
        // `None` is less than any number: one permit without approvals is enough.
        let least = determining.iter().map(|rule| rule.approvals).min();
        let effect = match least {
            Some(approvals) if !denied => approvals.map_or(Effect::Allow, Effect::ApprovalRequired),
            _ => Effect::Deny,
        };
        let deciding = determining.into_iter().filter(|rule| denied || Some(rule.approvals) == least);
        Verdict::new(effect, deciding, false)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::LazyLock;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::clock::ManualClock;
    use crate::environment::Environment;
    use crate::error::{Reason, Reasoned};
    use crate::identity::{PrincipalKind, Proof};
    use crate::policy::SHIPPED;
    use crate::secret::{EnvironmentName, SecretId};

    fn registry() -> Registry {
        let declared = ["development", "staging", "pr-1234", "production"].map(|name| {
            let mut environment = Environment::sealed(EnvironmentName::parse(name).unwrap());
            environment.protected = name == "production";
            environment
        });
        Registry::new(declared).unwrap()
    }

    fn clock() -> Arc<ManualClock> {
        ManualClock::new("2026-01-01T00:00:00Z".parse().unwrap())
    }

    fn source(text: &str) -> PolicySource {
        let schema = SHIPPED.iter().find(|(name, _)| *name == "schema.cedarschema").unwrap();
        let texts = [(schema.0, schema.1), ("a.cedar", text)];
        PolicySource::Texts(texts.map(|(name, text)| (name.to_owned(), text.to_owned())).to_vec())
    }

    fn load(text: &str) -> Policies {
        Policies::load(source(text), registry(), clock()).unwrap()
    }

    fn principal(kind: PrincipalKind, id: &str, groups: &[&str], claims: &[(&str, &str)]) -> Arc<Principal> {
        let groups: BTreeSet<String> = groups.iter().map(ToString::to_string).collect();
        let claims: BTreeMap<String, String> =
            claims.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Arc::new(Principal::new(kind, id, groups, claims, Proof { method: "token", detail: String::new() }))
    }

    fn user(id: &str, groups: &[&str]) -> Arc<Principal> {
        principal(PrincipalKind::User, id, groups, &[])
    }

    fn secret(environment: &str, name: &str) -> Resource {
        Resource::Secret(SecretId::parse(environment, name).unwrap())
    }

    fn read(policies: &Policies, principal: &Arc<Principal>, resource: &Resource) -> Result<Grant, Refusal> {
        policies.authorize(principal, Action::Read, resource, &Context::default())
    }

    fn ids(decision: &Decision) -> Vec<&str> {
        decision.policies.iter().map(|id| &**id).collect()
    }

    const TEAM_READS: &str = r#"
        @id("team-reads")
        permit (principal in Group::"team", action == Action::"read", resource in Environment::"development");
    "#;

    #[test]
    fn a_grant_names_what_was_asked_and_who_allowed_it() {
        let policies = load(TEAM_READS);
        let ana = user("ana", &["team"]);
        let grant = read(&policies, &ana, &secret("development", "database")).unwrap();
        assert_eq!(grant.principal(), &ana);
        assert_eq!((grant.action(), grant.resource()), (Action::Read, &secret("development", "database")));
        assert_eq!(grant.decision().effect, Effect::Allow);
        assert_eq!(ids(grant.decision()), ["team-reads"]);
    }

    #[test]
    fn nobody_is_let_in_by_default() {
        let policies = load(TEAM_READS);
        for (caller, resource) in [
            (user("eve", &[]), secret("development", "database")),
            (user("eve", &["Team"]), secret("development", "database")),
            (user("eve", &["team "]), secret("development", "database")),
            (user("eve", &["tea\u{43c}"]), secret("development", "database")),
            (user("ana", &["team"]), secret("production", "database")),
            (user("ana", &["team"]), secret("nowhere", "database")),
            (user("ana", &["team"]), Resource::Broker),
        ] {
            let refusal = read(&policies, &caller, &resource).unwrap_err();
            assert_eq!(refusal.reason(), Reason::Denied);
            assert_eq!(
                *refusal.decision,
                Decision { effect: Effect::Deny, policies: Vec::new(), evaluation_failed: false }
            );
        }
    }

    #[test]
    fn forbid_wins_and_is_named() {
        let policies = load(&format!(
            "{TEAM_READS} @id(\"not-ana\") forbid (principal == User::\"ana\", action, resource);"
        ));
        let refusal =
            read(&policies, &user("ana", &["team"]), &secret("development", "database")).unwrap_err();
        assert_eq!(ids(&refusal.decision), ["not-ana"]);
        assert!(read(&policies, &user("Ana", &["team"]), &secret("development", "database")).is_ok());
        assert!(read(&policies, &user("ana ", &["team"]), &secret("development", "database")).is_ok());
    }

    #[test]
    fn a_policy_that_fails_to_evaluate_denies_beside_a_permit() {
        for effect in ["permit", "forbid"] {
            let policies = load(&format!(
                "{TEAM_READS} @id(\"broken\") {effect} (principal, action == Action::\"read\", resource) \
                 when {{ 9223372036854775807 + 1 > 0 }};"
            ));
            let ana = user("ana", &["team"]);
            for _ in 0..2 {
                let refusal = read(&policies, &ana, &secret("development", "database")).unwrap_err();
                assert_eq!(refusal.reason(), Reason::Denied, "{effect}");
                assert!(refusal.decision.evaluation_failed);
                assert_eq!(ids(&refusal.decision), ["broken"]);
            }
            let question =
                policies.explain(&ana, Action::Read, &secret("development", "database"), &Context::default());
            assert!(!question.cached, "what failed is tried again");
            assert_eq!(question.effect, Effect::Deny);
            assert!(question.policies[0].error.as_ref().unwrap().contains("overflow"));
            assert!(question.policies[1].satisfied && !question.policies[1].decided);
        }
    }

    #[test]
    fn approvals_are_asked_for_only_where_no_other_permit_spares_them() {
        let policies = load(
            r#"
            @id("three") @approvals("3") permit (principal in Group::"a", action == Action::"delete", resource);
            @id("two") @approvals("2") permit (principal in Group::"b", action == Action::"delete", resource);
            @id("none") permit (principal in Group::"c", action == Action::"delete", resource);
            "#,
        );
        let delete = |groups: &[&str]| {
            let resource = secret("production", "database");
            policies.authorize(&user("ana", groups), Action::Delete, &resource, &Context::default())
        };
        let refusal = delete(&["a"]).unwrap_err();
        assert_eq!(refusal.reason(), Reason::ApprovalRequired);
        assert_eq!(refusal.decision.effect, Effect::ApprovalRequired(3));
        let refusal = delete(&["a", "b"]).unwrap_err();
        assert_eq!(refusal.decision.effect, Effect::ApprovalRequired(2));
        assert_eq!(ids(&refusal.decision), ["two"]);
        let grant = delete(&["a", "b", "c"]).unwrap();
        assert_eq!(ids(grant.decision()), ["none"]);
    }

    #[test]
    fn what_is_not_declared_is_protected() {
        let policies = load(
            r#"
            @id("open") permit (principal, action == Action::"read", resource) unless { resource.protected };
            "#,
        );
        let ana = user("ana", &[]);
        assert!(read(&policies, &ana, &secret("development", "x")).is_ok());
        for closed in [secret("production", "x"), secret("nowhere", "x"), Resource::Broker] {
            assert!(read(&policies, &ana, &closed).is_err(), "{closed}");
        }
    }

    #[test]
    fn decisions_are_remembered_until_the_policies_change() {
        let policies = load(TEAM_READS);
        let (ana, resource) = (user("ana", &["team"]), secret("development", "database"));
        let cached =
            |policies: &Policies| policies.explain(&ana, Action::Read, &resource, &Context::default()).cached;
        assert!(!cached(&policies));
        let first = read(&policies, &ana, &resource).unwrap();
        assert!(cached(&policies));
        let second = read(&policies, &ana, &resource).unwrap();
        assert!(Arc::ptr_eq(first.decision(), second.decision()), "remembered, not made anew");
        assert!(
            read(&policies, &user("ana", &[]), &resource).is_err(),
            "another fingerprint, another decision"
        );
        policies.reload().unwrap();
        assert!(!cached(&policies));
        assert_eq!(policies.generation(), 2);
    }

    #[test]
    fn a_decision_that_may_depend_on_the_context_is_not_remembered() {
        let policies = load(
            r#"
            @id("with-reason")
            permit (principal, action == Action::"read", resource in Environment::"production")
            when { context has reason && context.reason like "incident*" };
            "#,
        );
        let (ana, resource) = (user("ana", &[]), secret("production", "database"));
        let ask = |reason: Option<&str>| {
            let context = Context { reason: reason.map(str::to_owned) };
            policies.authorize(&ana, Action::Read, &resource, &context).is_ok()
        };
        assert!(ask(Some("incident 1")));
        assert!(!ask(None));
        assert!(!ask(Some("  ")));
        assert!(ask(Some("incident 2")));
        assert!(!policies.explain(&ana, Action::Read, &resource, &Context::default()).cached);
        let elsewhere = secret("staging", "database");
        assert!(read(&policies, &ana, &elsewhere).is_err());
        let explanation = policies.explain(&ana, Action::Read, &elsewhere, &Context::default());
        assert!(explanation.cached, "no policy here reads the context");
    }

    #[test]
    fn a_policy_expires_while_it_is_in_force() {
        let clock = clock();
        let text = format!(
            "@id(\"past\") @expires(\"2025-12-31T23:59:59Z\") permit (principal in Group::\"team\", action == \
             Action::\"list\", resource); {}",
            TEAM_READS
                .replace("@id(\"team-reads\")", "@id(\"team-reads\") @expires(\"2026-01-01T01:00:00Z\")")
        );
        let policies = Policies::load(source(&text), registry(), clock.clone()).unwrap();
        let (ana, resource) = (user("ana", &["team"]), secret("development", "database"));
        assert_eq!(policies.warnings().len(), 2, "{:?}", policies.warnings());
        assert!(policies.warnings()[0].contains("policy `past`: expired at 2025-12-31T23:59:59Z"));
        let listed = policies.authorize(&ana, Action::List, &resource, &Context::default());
        assert!(listed.is_err(), "expired before it was loaded");

        assert!(read(&policies, &ana, &resource).is_ok());
        clock.advance(Duration::from_secs(3_599));
        assert!(read(&policies, &ana, &resource).is_ok());
        assert_eq!(policies.generation(), 1);
        clock.advance(Duration::from_secs(1));
        assert!(read(&policies, &ana, &resource).is_err(), "although the decision was remembered");
        assert_eq!(policies.generation(), 2);
        assert_eq!((policies.len(), policies.warnings().len()), (2, 3));
        policies.reload().unwrap();
        assert!(read(&policies, &ana, &resource).is_err());
    }

    #[test]
    fn only_policies_whose_head_fits_are_evaluated() {
        let shipped = Policies::load(PolicySource::shipped(), registry(), clock()).unwrap();
        let asked = |caller: &Arc<Principal>, action, resource: &Resource| {
            let explanation = shipped.explain(caller, action, resource, &Context::default());
            assert!(explanation.in_force > 25);
            explanation.policies.iter().map(|policy| policy.id.to_string()).collect::<Vec<_>>()
        };
        let ana = user("ana", &["team"]);
        assert_eq!(
            asked(&ana, Action::Read, &secret("development", "x")),
            ["development-team-reads", "preview-team-reads"]
        );
        assert_eq!(asked(&ana, Action::Read, &secret("production", "x")), ["preview-team-reads"]);
        assert!(asked(&user("eve", &[]), Action::Read, &secret("production", "x")).is_empty());
    }

    #[test]
    fn callers_with_the_same_roles_share_a_policy_set() {
        let policies = load(TEAM_READS);
        for number in 0..50 {
            let _ = read(&policies, &user(&format!("u{number}"), &["team"]), &secret("development", "x"));
        }
        let state = policies.current();
        state.slices.run_pending_tasks();
        assert_eq!(state.slices.entry_count(), 1);
    }

    #[test]
    fn heads_alone_are_evaluated_once_and_conditions_every_time() {
        let policies = load(
            r#"
            @id("team-reads")
            permit (principal in Group::"team", action == Action::"read", resource in Environment::"development");
            @id("not-x")
            forbid (principal, action == Action::"read", resource == Secret::"development:x");
            @id("own")
            permit (principal, action == Action::"read", resource is Secret in Environment::"staging")
            when { principal.hasTag("app") && resource.folders.contains(principal.getTag("app")) };
            "#,
        );
        let settled = |numbers: &[u32]| {
            let state = policies.current();
            let slice = state.slices.get(&numbers.to_vec()).unwrap();
            slice.settled.get().map(|verdict| Arc::clone(&verdict.decision))
        };
        let (ana, ben) = (user("ana", &["team"]), user("ben", &["team", "other"]));
        let one = read(&policies, &ana, &secret("development", "database")).unwrap();
        let other = read(&policies, &ben, &secret("development", "other")).unwrap();
        assert!(Arc::ptr_eq(&settled(&[0]).unwrap(), one.decision()));
        assert!(Arc::ptr_eq(one.decision(), other.decision()), "the same heads, the same verdict");
        for caller in [&ana, &ben] {
            let refusal = read(&policies, caller, &secret("development", "x")).unwrap_err();
            assert_eq!(ids(&refusal.decision), ["not-x"]);
        }
        assert_eq!(ids(&settled(&[0, 1]).unwrap()), ["not-x"]);
        assert!(read(&policies, &user("eve", &[]), &secret("development", "database")).is_err());
        assert_eq!(ids(&settled(&[]).unwrap()), [""; 0]);

        let app = |name| principal(PrincipalKind::Workload, "app", &[], &[("app", name)]);
        assert!(read(&policies, &app("billing"), &secret("staging", "billing/key")).is_ok());
        assert!(read(&policies, &app("mail"), &secret("staging", "billing/key")).is_err());
        assert_eq!(settled(&[2]), None);
    }

    /// The shipped set, and with it every combination of heads, with conditions strewn in.
    static MANY: LazyLock<Policies> = LazyLock::new(|| {
        let principals = [
            "principal",
            "principal is User",
            "principal == User::\"a\"",
            "principal in Group::\"team\"",
            "principal is Workload in Group::\"ci\"",
            "principal in User::\"b\"",
        ];
        let actions = [
            "action",
            "action == Action::\"read\"",
            "action in [Action::\"write\", Action::\"delete\"]",
            "action in Action::\"audit\"",
        ];
        let resources = [
            "resource",
            "resource is Secret",
            "resource is Environment",
            "resource == Environment::\"production\"",
            "resource in Environment::\"production\"",
            "resource in Environment::\"claviger\"",
            "resource == Secret::\"staging:a/b\"",
            "resource is Secret in Environment::\"development\"",
        ];
        let conditions = [
            ("permit", ""),
            ("permit", "when { resource.environment like \"pr-*\" }"),
            ("@approvals(\"2\") permit", "unless { principal.hasTag(\"environment\") }"),
            ("forbid", "when { resource.protected && principal.hasTag(\"environment\") }"),
            ("permit", "when { context has reason && context.reason == \"b\" }"),
            ("@approvals(\"1\") permit", ""),
            ("forbid", "when { resource.environment == \"staging\" && 9223372036854775807 + 1 > 0 }"),
        ];
        let mut text = String::new();
        let mut number = 0;
        for principal in principals {
            for action in actions {
                for resource in resources {
                    let (effect, condition) = conditions[number % conditions.len()];
                    let wildcard = if effect.ends_with("permit") { "@allow_wildcard(\"test\")" } else { "" };
                    text.push_str(&format!(
                        "@id(\"g{number}\") {wildcard} {effect} ({principal}, {action}, {resource}) {condition};\n"
                    ));
                    number += 1;
                }
            }
        }
        let PolicySource::Texts(mut texts) = PolicySource::shipped() else {
            panic!("the shipped set is in memory")
        };
        texts.push(("generated.cedar".to_owned(), text));
        Policies::load(PolicySource::Texts(texts), registry(), clock()).unwrap()
    });

    /// The answer without slicing and without memory.
    static WHOLE: LazyLock<PolicySet> = LazyLock::new(|| {
        let state = MANY.current();
        PolicySet::from_policies(state.rules.rules.iter().map(|rule| rule.policy.clone())).unwrap()
    });

    fn any_principal() -> impl Strategy<Value = Arc<Principal>> {
        let groups = ["team", "ci", "leads", "operators", "administrators", "break-glass", "rotation-engine"];
        let groups = proptest::sample::subsequence(groups.to_vec(), 0..4);
        let environment = prop_oneof![Just(None), Just(Some("staging")), Just(Some("production"))];
        (any::<bool>(), prop_oneof![Just("a"), Just("b"), Just("c")], groups, environment).prop_map(
            |(person, id, groups, environment)| {
                let kind = if person { PrincipalKind::User } else { PrincipalKind::Workload };
                let claims: Vec<_> = environment.map(|name| ("environment", name)).into_iter().collect();
                principal(kind, id, &groups, &claims)
            },
        )
    }

    fn any_resource() -> impl Strategy<Value = Resource> {
        let environment = prop_oneof![
            Just("development"),
            Just("staging"),
            Just("pr-1234"),
            Just("production"),
            Just("nowhere")
        ];
        let name = prop_oneof![Just("a/b"), Just("database")];
        prop_oneof![
            1 => Just(Resource::Broker),
            2 => environment.clone().prop_map(|name| Resource::Environment(name.parse().unwrap())),
            4 => (environment, name).prop_map(|(environment, name)| secret(environment, name)),
        ]
    }

    proptest! {
        #[test]
        fn slicing_and_remembering_change_no_decision(
            caller in any_principal(),
            action in proptest::sample::select(Action::ALL),
            resource in any_resource(),
            reason in proptest::option::of(prop_oneof![Just("b".to_owned()), Just("c".to_owned())]),
        ) {
            let context = Context { reason };
            let question = Question { principal: &caller, action, resource: &resource, context: &context };
            let state = MANY.current();
            let sides = state.rules.vocabulary.sides(question);
            let asked = state.rules.vocabulary.ask(question, &sides, &MANY.registry).unwrap();
            let response = Authorizer::new().is_authorized(&asked.request, &WHOLE, &asked.entities);
            let whole = state.verdict(&response).decision;
            let sliced = MANY.decide(question);
            let again = MANY.decide(question);
            prop_assert_eq!(&sliced, &whole);
            prop_assert_eq!(&again, &whole);

            let explanation = MANY.explain(&caller, action, &resource, &context);
            prop_assert_eq!(explanation.effect, whole.effect);
            let decided: Vec<_> =
                explanation.policies.iter().filter(|policy| policy.decided).map(|policy| policy.id.clone()).collect();
            prop_assert_eq!(&decided, &whole.policies, "whatever decides fits by its head");
        }
    }
}
