//! Who may watch what, and the record of it.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::channel::{Arrival, Origin};
use super::feed::Seated;
use super::look::listed;
use super::seat::Sitter;
use super::{MAX_NAMES, Subject, WatchRequest, Watching};
use crate::audit::Record;
use crate::broker::{Broker, BrokerError, Call, record};
use crate::error::Reason;
use crate::policy::{Action, Grant, Resource};
use crate::secret::{EnvironmentName, SecretId, SecretName};

/// What a caller who may watch something may watch.
struct Admitted {
    /// The record of the start, without its end.
    record: Record,
    permitted: usize,
    denied: Vec<Denied>,
    /// What the store has under a prefix, where kv does not say it.
    listed: Vec<SecretName>,
}

/// What it may not, with the record of that.
struct Denied {
    name: SecretName,
    record: Record,
    error: BrokerError,
}

impl Broker {
    /// Begins to watch. What may not be read of the names is on record, and told as a problem each; of a prefix it is on
    /// record and kept quiet about.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Read`] on one of the names at least, or [`Action::List`] on the environment for
    /// a prefix. [`Reason::LimitExceeded`] over one of the [`Bounds`](super::Bounds).
    pub async fn watch(
        self: &Arc<Self>,
        call: &Call,
        request: WatchRequest,
    ) -> Result<Watching, BrokerError> {
        let environment = &request.environment;
        let Admitted { record, permitted, mut denied, listed } = match &request.subject {
            Subject::Names(names) => self.admit_names(call, environment, names).await?,
            Subject::Prefix(prefix) => self.admit_prefix(call, environment, prefix).await?,
        };
        let mut records: Vec<_> =
            denied.iter_mut().map(|denied| std::mem::take(&mut denied.record)).collect();
        let seated = self.seat(call, &request, &denied, listed).await;
        records.insert(
            0,
            match &seated {
                Ok(_) => record.done().with_detail(format!(
                    "{} watches after revision {}: {permitted} to be told of, {} withheld by policy",
                    request.consumer,
                    request.after,
                    denied.len()
                )),
                Err(error) => record.ended(error),
            },
        );
        let durability = self.durability(&Resource::Environment(environment.clone()));
        self.parts.log.append_all(records, durability).await?;
        let problems = match &request.subject {
            Subject::Names(_) => denied.into_iter().map(|denied| (denied.name, denied.error)).collect(),
            Subject::Prefix(_) => Vec::new(),
        };
        Ok(Watching::new(Arc::clone(self), call.clone(), request.with_values, seated?, permitted, problems))
    }

    async fn seat(
        &self,
        call: &Call,
        request: &WatchRequest,
        denied: &[Denied],
        listed: Vec<SecretName>,
    ) -> Result<Seated, BrokerError> {
        let channel = self.parts.feed.channel(&request.environment).await?;
        let sitter = Sitter { subject: request.subject.clone(), consumer: request.consumer.clone() };
        let denied: BTreeSet<_> = denied.iter().map(|denied| denied.name.clone()).collect();
        let arrival = Arrival { denied: &denied, listed, after: request.after };
        self.parts.feed.seat(channel, &call.principal.to_string(), sitter, arrival).await
    }

    /// At least one of the names has to be permitted; else all refusals are on record, and the first is the answer.
    async fn admit_names(
        &self,
        call: &Call,
        environment: &EnvironmentName,
        names: &BTreeSet<SecretName>,
    ) -> Result<Admitted, BrokerError> {
        if names.is_empty() || names.len() > MAX_NAMES {
            let message = format!("names: {} given; a watch has 1 to {MAX_NAMES}, or a prefix", names.len());
            let error = BrokerError::rejected(Reason::InvalidArgument, message);
            return Err(self.record_rejected(call, "watch", (environment.as_str(), ""), error).await);
        }
        let mut denied = self.denied(call, environment, names);
        let permitted = names.len() - denied.len();
        if permitted == 0 {
            let records = denied.iter_mut().map(|denied| std::mem::take(&mut denied.record)).collect();
            let durability = self.durability(&Resource::Environment(environment.clone()));
            self.parts.log.append_all(records, durability).await?;
            let none = || BrokerError::rejected(Reason::Internal, "a refusal without its reason");
            return Err(denied.into_iter().next().map_or_else(none, |denied| denied.error));
        }
        let about = match names.first() {
            Some(only) if names.len() == 1 => only.as_str(),
            _ => "",
        };
        let record = record::of_call(call, "watch").about(environment.as_str(), about);
        Ok(Admitted { record, permitted, denied, listed: Vec::new() })
    }

    /// A list of the environment has to be permitted; of what is on it, what may be read is watched.
    async fn admit_prefix(
        &self,
        call: &Call,
        environment: &EnvironmentName,
        prefix: &str,
    ) -> Result<Admitted, BrokerError> {
        let resource = Resource::Environment(environment.clone());
        let grant = self.authorize(call, "watch", Action::List, &resource).await?;
        let record = record::of_grant(call, "watch", &grant);
        match self.names_under(&grant, environment, prefix).await {
            Ok((names, listed)) => {
                let denied = self.denied(call, environment, &names);
                Ok(Admitted { record, permitted: names.len() - denied.len(), denied, listed })
            }
            Err(error) => {
                self.append(record.ended(&error), self.durability(&resource)).await?;
                Err(error)
            }
        }
    }

    /// All names that start so; and those of them that only the store knows.
    async fn names_under(
        &self,
        grant: &Grant,
        environment: &EnvironmentName,
        prefix: &str,
    ) -> Result<(BTreeSet<SecretName>, Vec<SecretName>), BrokerError> {
        let channel = self.parts.feed.channel(environment).await?;
        let listed = match channel.origin {
            Origin::Sealed => Vec::new(),
            Origin::Observed => listed(&self.parts.stores, grant, prefix).await?,
        };
        let mut names: BTreeSet<_> = channel.known_under(prefix).into_iter().collect();
        names.extend(listed.iter().cloned());
        Ok((names, listed))
    }

    /// Those of the names that the caller may not read.
    fn denied(
        &self,
        call: &Call,
        environment: &EnvironmentName,
        names: &BTreeSet<SecretName>,
    ) -> Vec<Denied> {
        let refused = |name: &SecretName| {
            let resource = Resource::Secret(SecretId::new(environment.clone(), name.clone()));
            let (decision, error) = self.decide(call, Action::Read, &resource).err()?;
            let decision = decision.as_deref();
            let record = record::of_resource(call, "watch", Action::Read, &resource, decision).ended(&error);
            Some(Denied { name: name.clone(), record, error })
        };
        names.iter().filter_map(refused).collect()
    }
}
