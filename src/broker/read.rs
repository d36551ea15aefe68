//! Reads: one secret, many, names, descriptions.

use super::{Broker, BrokerError, Call, record};
use crate::audit::{Batch, Record};
use crate::environment::Durability;
use crate::error::Reason;
use crate::policy::{Action, Grant, Resource};
use crate::secret::{EnvironmentName, FieldName, SecretId, SecretValue, Selector, Version, VersionId};
use crate::store::{Description, Fetched, Freshness, ListPage, ListRequest, Source};

/// How many items one batch may have.
pub const MAX_BATCH: usize = 500;

/// What is asked of one secret.
#[derive(Debug, Clone)]
pub struct Read {
    /// The secret.
    pub id: SecretId,
    /// One member of its JSON object.
    pub field: Option<FieldName>,
    /// Which version.
    pub selector: Selector,
    /// The version that the caller has.
    pub if_version_id: Option<VersionId>,
}

/// What leaves the broker.
#[derive(Debug, Clone)]
pub struct Disclosed {
    /// The secret.
    pub id: SecretId,
    /// The field that the value is of.
    pub field: Option<FieldName>,
    /// The version.
    pub version: Version,
    /// The value; `None` where the caller has it already.
    pub value: Option<SecretValue>,
    /// Store or cache.
    pub source: Source,
    /// How long ago the store said so.
    pub age: std::time::Duration,
    /// Whether it is past its time to live.
    pub stale: bool,
}

/// What a batch asks for.
#[derive(Debug)]
pub enum BatchRequest {
    /// These, in this order. An item that could not be understood keeps its place, and its error.
    Items(Vec<Result<Read, BrokerError>>),
    /// Every secret of an environment that the caller may read.
    All(EnvironmentName),
}

impl Broker {
    /// One version of one secret, or one field of it.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Read`].
    pub async fn get(&self, call: &Call, read: Read, freshness: Freshness) -> Result<Disclosed, BrokerError> {
        let grant = self.authorize(call, "get", Action::Read, &Resource::Secret(read.id.clone())).await?;
        let fetched = self.parts.stores.get(&grant, &read.selector, freshness).await;
        let result = fetched.map_err(BrokerError::from).and_then(|fetched| disclose(&read, fetched));
        let mut records = Batch::with_capacity(1);
        {
            let reads = record::Reads::of(call, "get");
            let view = reads.permitted(&grant, read.field.as_ref());
            records.push(&record::ended(view, result.as_ref()));
        }
        self.recorded(records, self.durability(grant.resource()), result).await?
    }

    /// Many secrets, each with its own result, in order. One record each; their values leave together, after all of
    /// the records.
    ///
    /// # Errors
    /// An empty or overlong batch, a refused list, or a log that can't be written. What is wrong with one item is
    /// that item's result.
    pub async fn batch(
        &self,
        call: &Call,
        request: BatchRequest,
        freshness: Freshness,
    ) -> Result<Vec<Result<Disclosed, BrokerError>>, BrokerError> {
        match request {
            BatchRequest::All(environment) => self.all(call, environment, freshness).await,
            BatchRequest::Items(items) => {
                if items.is_empty() || items.len() > MAX_BATCH {
                    let message = format!("items: {} given; a batch has 1 to {MAX_BATCH}", items.len());
                    let error = BrokerError::rejected(Reason::InvalidArgument, message);
                    return Err(self.record_rejected(call, "batch_get", ("", ""), error).await);
                }
                let items = items.into_iter().map(|item| self.permitted(call, item)).collect();
                self.read_permitted(call, items, freshness).await
            }
        }
    }

    /// Everything that the caller may read in an environment. What it may not is left out of the answer, but not of
    /// the log.
    async fn all(
        &self,
        call: &Call,
        environment: EnvironmentName,
        freshness: Freshness,
    ) -> Result<Vec<Result<Disclosed, BrokerError>>, BrokerError> {
        let grant = self
            .authorize(call, "batch_get", Action::List, &Resource::Environment(environment.clone()))
            .await?;
        let names = self.names(&grant).await;
        let permitted = names.map(|names| {
            let found = names.len();
            let (mut items, mut withheld) = (Vec::with_capacity(found), Vec::new());
            for name in names {
                let id = SecretId::new(environment.clone(), name);
                let resource = Resource::Secret(id.clone());
                let read = Read { id, field: None, selector: Selector::CURRENT, if_version_id: None };
                match self.decide(call, Action::Read, &resource) {
                    Ok(grant) => items.push(Item::Permitted(read, grant)),
                    Err((decision, error)) => {
                        let decision = decision.as_deref();
                        let record =
                            record::of_resource(call, "batch_get", Action::Read, &resource, decision);
                        withheld.push(record.ended(&error));
                    }
                }
            }
            (items, withheld)
        });
        let record = record::of_grant(call, "batch_get", &grant);
        let (items, withheld) = self
            .released(&grant, record, permitted, |(items, withheld), record| {
                record.done().with_detail(format!(
                    "{} to be read, {} withheld by policy",
                    items.len(),
                    withheld.len()
                ))
            })
            .await?;
        if !withheld.is_empty() {
            self.parts.log.append_all(withheld, self.durability(grant.resource())).await?;
        }
        self.read_permitted(call, items, freshness).await
    }

    async fn names(&self, grant: &Grant) -> Result<Vec<crate::secret::SecretName>, BrokerError> {
        let mut names = Vec::new();
        let mut request = ListRequest { limit: 100, ..ListRequest::default() };
        loop {
            let page = self.parts.stores.list(grant, &request).await?;
            names.extend(page.secrets.into_iter().map(|listed| listed.name));
            if names.len() > MAX_BATCH {
                let message = format!(
                    "the environment has more than {MAX_BATCH} secrets; name those wanted in a manifest"
                );
                return Err(BrokerError::rejected(Reason::LimitExceeded, message));
            }
            match page.next_page_token {
                Some(token) => request.page_token = Some(token),
                None => return Ok(names),
            }
        }
    }

    fn permitted(&self, call: &Call, item: Result<Read, BrokerError>) -> Item {
        let read = match item {
            Ok(read) => read,
            Err(error) => return Item::Refused(record::of_call(call, "batch_get").into(), error),
        };
        let resource = Resource::Secret(read.id.clone());
        let declared = |grant: Grant| match self.parts.registry.get(&read.id.environment) {
            Ok(_) => Ok(grant),
            Err(error) => Err((Some(grant.decision().clone()), error.into())),
        };
        match self.decide(call, Action::Read, &resource).and_then(declared) {
            Ok(grant) => Item::Permitted(read, grant),
            Err((decision, error)) => {
                let decision = decision.as_deref();
                let record = record::of_resource(call, "batch_get", Action::Read, &resource, decision);
                Item::Refused(record.of_field(read.field.as_ref()).into(), error)
            }
        }
    }

    async fn read_permitted(
        &self,
        call: &Call,
        items: Vec<Item>,
        freshness: Freshness,
    ) -> Result<Vec<Result<Disclosed, BrokerError>>, BrokerError> {
        let asked: Vec<_> = items
            .iter()
            .filter_map(|item| match item {
                Item::Permitted(read, grant) => Some((grant, read.selector.clone())),
                Item::Refused(..) => None,
            })
            .collect();
        let mut answers = self.parts.stores.batch_get(&asked, freshness).await.into_iter();
        let mut durability = Durability::Relaxed;
        let mut records = Batch::with_capacity(items.len());
        let mut results = Vec::with_capacity(items.len());
        let reads = record::Reads::of(call, "batch_get");
        for item in items {
            let result = match item {
                Item::Permitted(read, grant) => {
                    let missing =
                        || BrokerError::rejected(Reason::Internal, "the store gave fewer answers than asked");
                    let fetched = answers.next().ok_or_else(missing);
                    let result = fetched.and_then(|fetched| disclose(&read, fetched?));
                    if result.is_err() || self.durability(grant.resource()) == Durability::Durable {
                        durability = Durability::Durable;
                    }
                    let view = reads.permitted(&grant, read.field.as_ref());
                    records.push(&record::ended(view, result.as_ref()));
                    result
                }
                Item::Refused(record, error) => {
                    durability = Durability::Durable;
                    records.push(&record.ended(&error).view());
                    Err(error)
                }
            };
            results.push(result);
        }
        self.recorded(records, durability, results).await
    }

    /// A page of an environment's names.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::List`].
    pub async fn list(
        &self,
        call: &Call,
        environment: EnvironmentName,
        request: &ListRequest,
    ) -> Result<ListPage, BrokerError> {
        let grant = self.authorize(call, "list", Action::List, &Resource::Environment(environment)).await?;
        let page = self.parts.stores.list(&grant, request).await.map_err(BrokerError::from);
        let record = record::of_grant(call, "list", &grant);
        self.released(&grant, record, page, |page, record| {
            record.done().with_detail(format!("{} listed", page.secrets.len()))
        })
        .await
    }

    /// A secret's versions and labels.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Describe`].
    pub async fn describe(&self, call: &Call, id: SecretId) -> Result<Description, BrokerError> {
        let grant = self.authorize(call, "describe", Action::Describe, &Resource::Secret(id)).await?;
        let description = self.parts.stores.describe(&grant).await.map_err(BrokerError::from);
        let record = record::of_grant(call, "describe", &grant);
        self.released(&grant, record, description, |_, record| record.done()).await
    }
}

/// One item on its way: what to ask, or why not to and what is recorded of that.
enum Item {
    Permitted(Read, Grant),
    Refused(Box<Record>, BrokerError),
}

/// Cuts what was fetched down to what was asked for.
fn disclose(read: &Read, fetched: Fetched) -> Result<Disclosed, BrokerError> {
    let Fetched { version, value, source, age, stale, .. } = fetched;
    let value = if read.if_version_id.as_ref() == Some(&version.id) {
        None
    } else if let Some(field) = &read.field {
        let field = value.field(field);
        Some(field.map_err(|source| BrokerError::Field { id: read.id.clone(), source })?)
    } else {
        Some(value)
    };
    Ok(Disclosed { id: read.id.clone(), field: read.field.clone(), version, value, source, age, stale })
}
