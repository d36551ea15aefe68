//! The broker's own business: tokens, policies, the audit log.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::broadcast;

use super::{Broker, BrokerError, Call, record};
use crate::audit::{Kind, Query, Record, Report};
use crate::environment::Durability;
use crate::error::Reason;
use crate::identity::Principal;
use crate::identity::token::{Shown, TokenRecord, TokenRequest};
use crate::policy::{Action, Context, Effect, Explanation, Reloaded, Resource};
use crate::secret::{EnvironmentName, SecretId, SecretValue};

/// Which part of the log a caller may see: one environment's records, or all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuditView {
    /// One environment's.
    Environment(EnvironmentName),
    /// All of them.
    Everything,
}

impl AuditView {
    fn resource(&self) -> Resource {
        match self {
            Self::Environment(environment) => Resource::Environment(environment.clone()),
            Self::Everything => Resource::Broker,
        }
    }
}

impl Broker {
    /// Issues a token. The value is the token itself, given out this once.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Administer`] on the broker, and that the environments are declared which the
    /// token is to be good for.
    pub async fn create_token(
        &self,
        call: &Call,
        request: TokenRequest,
    ) -> Result<(TokenRecord, SecretValue), BrokerError> {
        let grant = self.authorize(call, "create_token", Action::Administer, &Resource::Broker).await?;
        let undeclared = request.environments.iter().find_map(|name| self.parts.registry.get(name).err());
        if let Some(error) = undeclared {
            return self.finished(call, "create_token", &grant, Err(error.into())).await;
        }
        self.intend(call, "create_token", &grant).await?;
        let created = self.parts.tokens.create(request).await.map_err(BrokerError::from);
        let record = record::of_grant(call, "create_token", &grant);
        self.released(&grant, record, created, |(token, _), record| record.done().with_detail(said_of(token)))
            .await
    }

    /// Every token with its last use, without secrets.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Administer`] on the broker.
    pub async fn list_tokens(&self, call: &Call) -> Result<Vec<Shown>, BrokerError> {
        let grant = self.authorize(call, "list_tokens", Action::Administer, &Resource::Broker).await?;
        self.finished(call, "list_tokens", &grant, Ok(self.parts.tokens.list())).await
    }

    /// Ends a token; the next request with it is refused.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Administer`] on the broker.
    pub async fn revoke_token(&self, call: &Call, id: &str) -> Result<(), BrokerError> {
        let grant = self.authorize(call, "revoke_token", Action::Administer, &Resource::Broker).await?;
        self.intend(call, "revoke_token", &grant).await?;
        let revoked = self.parts.tokens.revoke(id).await.map_err(BrokerError::from);
        let record = record::of_grant(call, "revoke_token", &grant);
        self.released(&grant, record, revoked, |token, record| record.done().with_detail(said_of(token)))
            .await
            .map(|_| ())
    }

    /// Removes the records of tokens that ended long ago, each after it is said in the log, and gives their ids. Nobody's
    /// call: the time has come.
    ///
    /// # Errors
    /// Where the log or the database can't be written. What was not removed stays for the next time.
    pub async fn prune_tokens(&self) -> Result<Vec<String>, BrokerError> {
        let mut pruned = Vec::new();
        loop {
            let gone = self.parts.tokens.gone();
            for token in &gone {
                self.append(pruning(token), Durability::Durable).await?;
            }
            let removed = self.parts.tokens.prune(gone.into_iter().map(|token| token.id).collect()).await?;
            if removed.is_empty() {
                return Ok(pruned);
            }
            pruned.extend(removed);
        }
    }

    /// Keeps when and from where tokens were last used.
    ///
    /// # Errors
    /// Where the database can't be written.
    pub async fn keep_token_use(&self) -> Result<(), BrokerError> {
        Ok(self.parts.tokens.keep_last_use().await?)
    }

    /// Whether the caller may do something, with the credential presented; nothing is done.
    ///
    /// # Errors
    /// Where the log can't be written.
    pub async fn check_policy(
        &self,
        call: &Call,
        action: Action,
        resource: &Resource,
    ) -> Result<Effect, BrokerError> {
        let context = Context { reason: call.reason.clone() };
        let decision = match self.parts.policies.authorize(&call.principal, action, resource, &context) {
            Ok(grant) => Arc::clone(grant.decision()),
            Err(refusal) => refusal.decision,
        };
        let record = record::of_resource(call, "check_policy", action, resource, Some(&decision)).done();
        let (effect, record) = match self.admitted(call, resource) {
            Ok(()) => (decision.effect, record),
            Err(error) => (Effect::Deny, record.with_detail(error.to_string())),
        };
        self.append(record, self.durability(resource)).await?;
        Ok(effect)
    }

    /// Why `subject` may or may not; the caller itself where `None`.
    ///
    /// # Errors
    /// [`BrokerError`]; about another than the caller: needs [`Action::Administer`] on the broker.
    pub async fn explain_policy(
        &self,
        call: &Call,
        subject: Option<Principal>,
        action: Action,
        resource: &Resource,
    ) -> Result<Explanation, BrokerError> {
        if subject.is_some() {
            self.authorize(call, "explain_policy", Action::Administer, &Resource::Broker).await?;
        }
        // Of others it is not known which credential they present, nor from where.
        let admitted = if subject.is_none() { self.admitted(call, resource) } else { Ok(()) };
        let context = Context { reason: call.reason.clone() };
        let principal = subject.map_or_else(|| Arc::clone(&call.principal), Arc::new);
        let explanation = self.parts.policies.explain(&principal, action, resource, &context);
        // A permission for what is not there would be no help; a refusal does not say whether it is.
        let declared = match (explanation.effect, resource.environment()) {
            (Effect::Allow, Some(environment)) => self.parts.registry.get(environment).map(|_| ()),
            _ => Ok(()),
        };
        let explained = admitted.and(declared.map_err(BrokerError::from)).map(|()| explanation);
        let record = record::of_resource(call, "explain_policy", action, resource, None);
        let record = match &explained {
            Ok(_) => record.done(),
            Err(error) => record.ended(error),
        };
        self.append(record.with_detail(format!("about {principal}")), self.durability(resource)).await?;
        explained
    }

    /// Reads the policy files again; where they are not valid, the last good set stays.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Administer`] on the broker.
    pub async fn reload_policy(&self, call: &Call) -> Result<Reloaded, BrokerError> {
        let grant = self.authorize(call, "reload_policy", Action::Administer, &Resource::Broker).await?;
        self.intend(call, "reload_policy", &grant).await?;
        let reloaded = self.read_policies().await;
        let record = record::of_grant(call, "reload_policy", &grant);
        self.released(&grant, record, reloaded, |reloaded, record| {
            record
                .done()
                .with_detail(format!("generation {}, {} policies", reloaded.generation, reloaded.policies))
        })
        .await
    }

    /// The same, without a caller: the policy files changed, or the process was told to look.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn reload_policy_unasked(&self, cause: &str) -> Result<Reloaded, BrokerError> {
        // On record before it takes effect, as every change.
        let intent = record::of_policies("reload_policy").intent().with_detail(cause);
        self.append(intent, Durability::Durable).await?;
        let reloaded = self.read_policies().await;
        let record = record::of_policies("reload_policy");
        let record = match &reloaded {
            Ok(reloaded) => record.done().with_detail(format!(
                "{cause}: generation {}, {} policies",
                reloaded.generation, reloaded.policies
            )),
            Err(error) => {
                record.ended(error).with_detail(format!("{cause}: {error}; the last good set stays"))
            }
        };
        self.append(record, Durability::Durable).await?;
        reloaded
    }

    async fn read_policies(&self) -> Result<Reloaded, BrokerError> {
        let policies = Arc::clone(&self.parts.policies);
        let reloaded = off_the_reactor(move || policies.reload()).await;
        self.parts.metrics.policy_reload(reloaded.is_ok());
        self.reload_refused.store(reloaded.is_err(), Ordering::Relaxed);
        reloaded
    }

    /// Whether the policies in force are not those in the folder, because those were refused at the last reload.
    #[must_use]
    pub fn policy_reload_refused(&self) -> bool {
        self.reload_refused.load(Ordering::Relaxed)
    }

    /// Puts the set in force on record.
    ///
    /// # Errors
    /// Where the log can't be written.
    pub async fn record_policy_loaded(&self, cause: &str) -> Result<(), BrokerError> {
        let policies = &self.parts.policies;
        let detail = format!("{cause}: generation {}, {} policies", policies.generation(), policies.len());
        self.append(record::of_policies("load_policy").done().with_detail(detail), Durability::Durable).await
    }

    /// Puts the removal of a secret whose recovery window is over on record, before it is made. The deletion itself was
    /// authorised, and recorded, when it was asked for.
    ///
    /// # Errors
    /// Where the log can't be written: then nothing is removed.
    pub async fn record_purge(&self, id: &SecretId) -> Result<(), BrokerError> {
        let record = record::of_housekeeping("purge", id).with_detail("its recovery window is over");
        self.append(record, Durability::Durable).await
    }

    /// Records that match `query`, newest first, of the part of the log that `view` names.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Audit`] on the environment or the broker.
    pub async fn query_audit(
        &self,
        call: &Call,
        view: &AuditView,
        mut query: Query,
    ) -> Result<Vec<String>, BrokerError> {
        let grant = self.authorize(call, "query_audit", Action::Audit, &view.resource()).await?;
        if let AuditView::Environment(environment) = view {
            query.environment = Some(environment.to_string());
        }
        let directory = self.parts.log.directory().to_owned();
        let lines = off_the_reactor(move || crate::audit::query(&directory, &query)).await;
        let record = record::of_grant(call, "query_audit", &grant);
        self.released(&grant, record, lines, |lines, record| {
            record.done().with_detail(format!("{} records", lines.len()))
        })
        .await
    }

    /// Records as they are made durable, from now on.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Audit`] on the environment or the broker.
    pub async fn tail_audit(
        &self,
        call: &Call,
        view: &AuditView,
    ) -> Result<broadcast::Receiver<Arc<str>>, BrokerError> {
        let grant = self.authorize(call, "tail_audit", Action::Audit, &view.resource()).await?;
        let lines = self.parts.log.subscribe();
        self.finished(call, "tail_audit", &grant, Ok(lines)).await
    }

    /// Whether whoever follows the log still may: their token is good, and policy has not changed its mind. Asked with
    /// every record that a tail is about to send; the answer is cached as any decision is.
    ///
    /// # Errors
    /// Why not.
    pub fn may_still_tail(&self, call: &Call, view: &AuditView) -> Result<(), BrokerError> {
        if !self.parts.tokens.is_live(&call.principal) {
            let message = "the token presented has ended; ask for a new one";
            return Err(BrokerError::rejected(Reason::Unauthenticated, message));
        }
        let decided = self.decide(call, Action::Audit, &view.resource());
        decided.map(|_| ()).map_err(|(_, error)| error)
    }

    /// Walks every chain of the log from its start.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Audit`] on the broker.
    pub async fn verify_audit(&self, call: &Call) -> Result<Report, BrokerError> {
        let keys = self.parts.log.verifying_keys();
        let grant = self.authorize(call, "verify_audit", Action::Audit, &Resource::Broker).await?;
        let directory = self.parts.log.directory().to_owned();
        let report = off_the_reactor(move || crate::audit::verify(&directory, &keys, &[])).await;
        let record = record::of_grant(call, "verify_audit", &grant);
        self.released(&grant, record, report, |report, record| {
            record.done().with_detail(format!("{} findings", report.findings.len()))
        })
        .await
    }
}

fn said_of(token: &TokenRecord) -> String {
    let mut said = format!(
        "token {} of {}::\"{}\", expires {}",
        token.id,
        token.kind.entity_type(),
        token.principal,
        token.expires_at
    );
    for (what, limits) in
        [("only in", texts(&token.environments)), ("only from", texts(&token.source_addresses))]
    {
        if !limits.is_empty() {
            said.push_str(&format!(", {what} {}", limits.join(" ")));
        }
    }
    said
}

fn texts<T: ToString>(all: impl IntoIterator<Item = T>) -> Vec<String> {
    all.into_iter().map(|one| one.to_string()).collect()
}

fn pruning(token: &TokenRecord) -> Record {
    Record {
        kind: Some(Kind::Intent),
        operation: "prune_token".to_owned(),
        detail: format!("ended more than 30 days ago: {}", said_of(token)),
        ..Record::default()
    }
}

/// Reading files, and checking what is in them, takes as long as there is of it.
async fn off_the_reactor<T: Send + 'static, E: Into<BrokerError> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, BrokerError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(E::into),
        Err(error) => Err(BrokerError::rejected(Reason::Internal, format!("reading files failed: {error}"))),
    }
}
