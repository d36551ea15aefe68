//! Finding what changed in a store that tells nobody: each watched secret is looked at once per time to live, by
//! whichever of its watchers is first, under that watcher's own leave to read it. What is found goes into kv, and from
//! there to all of them. Nothing leaves the broker here, so nothing is on record here.

use std::sync::Arc;

use super::channel::Channel;
use super::{Current, Subject, is_absence};
use crate::broker::{Broker, BrokerError, Call, MAX_BATCH};
use crate::error::Reason;
use crate::policy::{Action, Grant, Resource};
use crate::secret::{SecretName, Selector};
use crate::store::guarded::Guarded;
use crate::store::{Freshness, ListRequest};

/// How many names under a prefix are followed, where the store has to be asked for them.
const MOST_LISTED: usize = 10_000;

/// Looks at what nobody looked at lately of what this caller watches.
pub(super) async fn look(broker: Arc<Broker>, call: Call, channel: Arc<Channel>, subject: Subject) {
    let names = match subject {
        Subject::Names(names) => names.into_iter().collect(),
        Subject::Prefix(prefix) => under(&broker, &call, &channel, &prefix).await,
    };
    let permitted = |name: SecretName| {
        let resource = Resource::Secret(channel.id(&name));
        broker.decide(&call, Action::Read, &resource).ok().map(|grant| (name, grant))
    };
    let (names, grants): (Vec<_>, Vec<_>) = names.into_iter().filter_map(permitted).unzip();
    let claimed = channel.claim(names.clone());
    let mut asked: Vec<_> = names.into_iter().zip(grants).collect();
    asked.retain(|(name, _)| claimed.binary_search(name).is_ok());
    for some in asked.chunks(MAX_BATCH) {
        look_at(&broker, &channel, some).await;
    }
}

async fn look_at(broker: &Broker, channel: &Channel, asked: &[(SecretName, Grant)]) {
    // Before the store is asked: what is learnt meanwhile from elsewhere is newer.
    let known: Vec<_> = asked.iter().map(|(name, _)| channel.known(name)).collect();
    let items: Vec<_> = asked.iter().map(|(_, grant)| (grant, Selector::CURRENT)).collect();
    let answers = broker.parts.stores.batch_get(&items, Freshness::Refresh).await;
    for (((name, _), before), answer) in asked.iter().zip(known).zip(answers) {
        let current = match answer {
            Ok(fetched) => Current::Version(fetched.version.id),
            Err(error) if is_absence(&error) => Current::Gone,
            Err(error) => {
                tracing::debug!(%error, "a watched secret could not be looked at");
                continue;
            }
        };
        // A secret that never was is no news.
        if before.is_some() || current != Current::Gone {
            channel.observe(name, before.as_ref(), current).await;
        }
    }
}

/// The names under a prefix, sorted: those that were seen before, and where nobody asked lately, those that the store
/// has now.
async fn under(broker: &Broker, call: &Call, channel: &Channel, prefix: &str) -> Vec<SecretName> {
    let mut names = channel.known_under(prefix);
    let resource = Resource::Environment(channel.environment.name.clone());
    if let Ok(grant) = broker.decide(call, Action::List, &resource)
        && channel.claim_list(prefix)
    {
        match listed(&broker.parts.stores, &grant, prefix).await {
            Ok(listed) => names.extend(listed),
            Err(error) => tracing::debug!(%error, "a watched prefix could not be listed"),
        }
    }
    names.sort_unstable();
    names.dedup();
    names
}

/// The names of a store that start so.
pub(super) async fn listed(
    stores: &Guarded,
    grant: &Grant,
    prefix: &str,
) -> Result<Vec<SecretName>, BrokerError> {
    let mut names = Vec::new();
    let mut request = ListRequest { prefix: prefix.to_owned(), limit: 100, ..ListRequest::default() };
    loop {
        let page = stores.list(grant, &request).await?;
        names.extend(page.secrets.into_iter().map(|listed| listed.name));
        if names.len() > MOST_LISTED {
            let message =
                format!("more than {MOST_LISTED} secrets start so; watch a longer prefix, or name them");
            return Err(BrokerError::rejected(Reason::LimitExceeded, message));
        }
        match page.next_page_token {
            Some(token) => request.page_token = Some(token),
            None => return Ok(names),
        }
    }
}
