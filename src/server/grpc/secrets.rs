//! `SecretService`.

use std::sync::Arc;

use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::door::Caller;
use super::status::{problem, status};
use super::{Changes, convert, missing_caller, watches};
use crate::broker::{BatchRequest, Broker, BrokerError, Call, Disclosed, MAX_BATCH, Read};
use crate::proto::v1::{self, batch_get_secrets_result, secret_service_server::SecretService};
use crate::secret::LabelMove;
use crate::store::{ListRequest, Put, RecoveryWindow};

/// The service.
pub(super) struct Secrets {
    broker: Arc<Broker>,
    changes: Changes,
    shutdown: watch::Receiver<bool>,
}

impl Secrets {
    pub(super) const fn new(broker: Arc<Broker>, changes: Changes, shutdown: watch::Receiver<bool>) -> Self {
        Self { broker, changes, shutdown }
    }

    /// Runs one request: a message that makes no sense is on record like anything else, and every error becomes a
    /// status in one place.
    async fn answer<Q, A, F>(
        &self,
        request: Request<Q>,
        operation: &'static str,
        said: impl FnOnce(&Q) -> Said<'_>,
        serve: impl FnOnce(Call, Q) -> Result<F, BrokerError>,
    ) -> Result<Response<A>, Status>
    where
        F: Future<Output = Result<A, BrokerError>>,
    {
        answer(&self.broker, request, operation, said, serve).await
    }
}

/// What a message says before it is understood: the reason, and what it is about.
#[derive(Default)]
pub(super) struct Said<'a> {
    pub(super) reason: &'a str,
    pub(super) environment: &'a str,
    pub(super) name: &'a str,
}

macro_rules! said {
    () => {
        |q| Said { reason: &q.reason, environment: &q.environment, name: &q.name }
    };
}

/// As [`Secrets::answer`], for every service.
pub(super) async fn answer<Q, A, F>(
    broker: &Arc<Broker>,
    request: Request<Q>,
    operation: &'static str,
    said: impl FnOnce(&Q) -> Said<'_>,
    serve: impl FnOnce(Call, Q) -> Result<F, BrokerError>,
) -> Result<Response<A>, Status>
where
    F: Future<Output = Result<A, BrokerError>>,
{
    let caller = request.extensions().get::<Caller>().cloned().ok_or_else(missing_caller)?;
    let message = request.into_inner();
    let Said { reason, environment, name } = said(&message);
    let about = (environment.to_owned(), name.to_owned());
    let parsed = match convert::reason(reason) {
        Ok(reason) => {
            let call = caller.call(reason);
            serve(call, message)
        }
        Err(error) => Err(error),
    };
    let answered = match parsed {
        Ok(serving) => serving.await,
        Err(error) => {
            let about = (about.0.as_str(), about.1.as_str());
            Err(broker.record_rejected(&caller.call(""), operation, about, error).await)
        }
    };
    answered.map(Response::new).map_err(|error| status(&error, &caller.request_id))
}

/// Answers one read: as [`answer`] does, without what a read has no use for.
pub(super) async fn disclose(
    broker: &Broker,
    caller: &Caller,
    message: v1::GetSecretRequest,
) -> Result<Disclosed, Status> {
    let outcome = match understood(caller, &message) {
        Ok((call, read)) => broker.get(&call, read, convert::freshness(message.refresh)).await,
        Err(error) => {
            let about = (message.environment.as_str(), message.name.as_str());
            Err(Box::pin(broker.record_rejected(&caller.call(""), "get", about, error)).await)
        }
    };
    outcome.map_err(|error| status(&error, &caller.request_id))
}

fn understood(caller: &Caller, message: &v1::GetSecretRequest) -> Result<(Call, Read), BrokerError> {
    let call = caller.call(convert::reason(&message.reason)?);
    convert::no_approval(&message.approval_id)?;
    let v1::GetSecretRequest { environment, name, field, selector, if_version_id, .. } = message;
    Ok((call, convert::asked(environment, name, field, selector.as_ref(), if_version_id)?))
}

#[tonic::async_trait]
impl SecretService for Secrets {
    async fn get_secret(
        &self,
        request: Request<v1::GetSecretRequest>,
    ) -> Result<Response<v1::GetSecretResponse>, Status> {
        let caller = request.extensions().get::<Caller>().cloned().ok_or_else(missing_caller)?;
        let disclosed = disclose(&self.broker, &caller, request.into_inner()).await?;
        Ok(Response::new(v1::GetSecretResponse { secret: Some(convert::secret(disclosed)) }))
    }

    async fn batch_get_secrets(
        &self,
        request: Request<v1::BatchGetSecretsRequest>,
    ) -> Result<Response<v1::BatchGetSecretsResponse>, Status> {
        self.answer(
            request,
            "batch_get",
            |q| Said { reason: &q.reason, environment: &q.all_in_environment, name: "" },
            |call, q| {
                convert::no_approval(&q.approval_id)?;
                let freshness = convert::freshness(q.refresh);
                let batch = match (q.all_in_environment.as_str(), q.items) {
                    ("", items) if items.len() > MAX_BATCH => {
                        return Err(convert::invalid(format!(
                            "items: {} given; a batch has 1 to {MAX_BATCH}",
                            items.len()
                        )));
                    }
                    ("", items) => BatchRequest::Items(items.into_iter().map(convert::read).collect()),
                    (environment, items) if items.is_empty() => {
                        BatchRequest::All(convert::environment(environment)?)
                    }
                    _ => {
                        return Err(convert::invalid(
                            "items and all_in_environment exclude each other; give one",
                        ));
                    }
                };
                Ok(async move {
                    let answers = self.broker.batch(&call, batch, freshness).await?;
                    let results = answers.into_iter().map(|answer| v1::BatchGetSecretsResult {
                        result: Some(match answer {
                            Ok(disclosed) => {
                                batch_get_secrets_result::Result::Secret(convert::secret(disclosed))
                            }
                            Err(error) => batch_get_secrets_result::Result::Problem(problem(&error)),
                        }),
                    });
                    Ok(v1::BatchGetSecretsResponse { results: results.collect() })
                })
            },
        )
        .await
    }

    async fn list_secrets(
        &self,
        request: Request<v1::ListSecretsRequest>,
    ) -> Result<Response<v1::ListSecretsResponse>, Status> {
        self.answer(
            request,
            "list",
            |q| Said { reason: &q.reason, environment: &q.environment, name: "" },
            |call, q| {
                let environment = convert::environment(&q.environment)?;
                let list = ListRequest {
                    prefix: q.prefix,
                    page_token: (!q.page_token.is_empty()).then_some(q.page_token),
                    limit: page_size(q.page_size)?,
                    include_deleted: q.include_deleted,
                };
                Ok(async move {
                    let page = self.broker.list(&call, environment, &list).await?;
                    let secrets = page.secrets.into_iter().map(|listed| v1::ListedSecret {
                        name: convert::name(&listed.name),
                        changed_at: Some(convert::timestamp(listed.changed_at)),
                        deletion_at: listed.deletion_at.map(convert::timestamp),
                    });
                    Ok(v1::ListSecretsResponse {
                        secrets: secrets.collect(),
                        next_page_token: page.next_page_token.unwrap_or_default(),
                    })
                })
            },
        )
        .await
    }

    async fn describe_secret(
        &self,
        request: Request<v1::DescribeSecretRequest>,
    ) -> Result<Response<v1::DescribeSecretResponse>, Status> {
        self.answer(request, "describe", said!(), |call, q| {
            let id = convert::secret_id(&q.environment, &q.name)?;
            Ok(async move {
                let found = self.broker.describe(&call, id).await?;
                Ok(v1::DescribeSecretResponse {
                    environment: q.environment,
                    name: q.name,
                    versions: found.versions.iter().map(convert::version).collect(),
                    created_at: Some(convert::timestamp(found.created_at)),
                    changed_at: Some(convert::timestamp(found.changed_at)),
                    deletion_at: found.deletion_at.map(convert::timestamp),
                })
            })
        })
        .await
    }

    async fn put_secret(
        &self,
        request: Request<v1::PutSecretRequest>,
    ) -> Result<Response<v1::PutSecretResponse>, Status> {
        self.answer(request, "put", said!(), |call, q| {
            convert::no_approval(&q.approval_id)?;
            let id = convert::secret_id(&q.environment, &q.name)?;
            let expected = convert::optional_version_id(&q.expected_version_id)?;
            let labels: Result<_, _> = q.labels.iter().map(|label| convert::label(label)).collect();
            let put = Put {
                token: convert::version_id(&q.client_request_token)?,
                labels: labels?,
                expected: match (expected, q.must_not_exist) {
                    (Some(_), true) => {
                        return Err(convert::invalid(
                            "expected_version_id and must_not_exist exclude each other",
                        ));
                    }
                    (Some(version), false) => Some(Some(version)),
                    (None, true) => Some(None),
                    (None, false) => None,
                },
                value: convert::payload(q.payload)?,
            };
            let broker = Arc::clone(&self.broker);
            Ok(self.changes.run(async move {
                let written = broker.put(&call, id, put, q.allow_empty).await?;
                let version = Some(convert::version(&written.version));
                Ok(v1::PutSecretResponse { version, changed: written.changed })
            }))
        })
        .await
    }

    async fn move_label(
        &self,
        request: Request<v1::MoveLabelRequest>,
    ) -> Result<Response<v1::MoveLabelResponse>, Status> {
        self.answer(request, "move_label", said!(), |call, q| {
            let id = convert::secret_id(&q.environment, &q.name)?;
            let change = LabelMove {
                label: convert::label(&q.label)?,
                from: convert::optional_version_id(&q.from_version_id)?,
                to: convert::optional_version_id(&q.to_version_id)?,
            };
            let broker = Arc::clone(&self.broker);
            Ok(self.changes.run(async move {
                let changed = broker.move_label(&call, id, change).await?.changed;
                Ok(v1::MoveLabelResponse { changed })
            }))
        })
        .await
    }

    async fn rollback_secret(
        &self,
        request: Request<v1::RollbackSecretRequest>,
    ) -> Result<Response<v1::RollbackSecretResponse>, Status> {
        self.answer(request, "rollback", said!(), |call, q| {
            convert::no_approval(&q.approval_id)?;
            let id = convert::secret_id(&q.environment, &q.name)?;
            let to = convert::optional_version_id(&q.to_version_id)?;
            let expected = convert::optional_version_id(&q.expected_version_id)?;
            let broker = Arc::clone(&self.broker);
            Ok(self.changes.run(async move {
                let rolled = broker.rollback(&call, id, to, expected).await?;
                Ok(v1::RollbackSecretResponse {
                    version: Some(convert::version(&rolled.version)),
                    superseded_version_id: rolled.superseded.map(|id| id.to_string()).unwrap_or_default(),
                })
            }))
        })
        .await
    }

    async fn delete_secret(
        &self,
        request: Request<v1::DeleteSecretRequest>,
    ) -> Result<Response<v1::DeleteSecretResponse>, Status> {
        self.answer(request, "delete", said!(), |call, q| {
            convert::no_approval(&q.approval_id)?;
            let id = convert::secret_id(&q.environment, &q.name)?;
            let window = recovery_window(q.recovery_window_days)?;
            let broker = Arc::clone(&self.broker);
            Ok(self.changes.run(async move {
                let until = broker.delete(&call, id, window).await?;
                Ok(v1::DeleteSecretResponse { deletion_at: Some(convert::timestamp(until)) })
            }))
        })
        .await
    }

    async fn restore_secret(
        &self,
        request: Request<v1::RestoreSecretRequest>,
    ) -> Result<Response<v1::RestoreSecretResponse>, Status> {
        self.answer(request, "restore", said!(), |call, q| {
            convert::no_approval(&q.approval_id)?;
            let id = convert::secret_id(&q.environment, &q.name)?;
            let broker = Arc::clone(&self.broker);
            Ok(self.changes.run(async move {
                broker.restore(&call, id).await?;
                Ok(v1::RestoreSecretResponse {})
            }))
        })
        .await
    }

    type WatchSecretsStream = watches::Watch;

    async fn watch_secrets(
        &self,
        request: Request<v1::WatchSecretsRequest>,
    ) -> Result<Response<watches::Watch>, Status> {
        watches::watch_secrets(&self.broker, self.shutdown.clone(), request).await
    }

    async fn report_version_in_use(
        &self,
        request: Request<v1::ReportVersionInUseRequest>,
    ) -> Result<Response<v1::ReportVersionInUseResponse>, Status> {
        watches::report_version_in_use(&self.broker, &self.changes, request).await
    }

    async fn list_consumers(
        &self,
        request: Request<v1::ListConsumersRequest>,
    ) -> Result<Response<v1::ListConsumersResponse>, Status> {
        watches::list_consumers(&self.broker, request).await
    }
}

fn page_size(asked: i32) -> Result<usize, BrokerError> {
    match usize::try_from(asked) {
        Ok(0) => Ok(100),
        Ok(size @ 1..=100) => Ok(size),
        _ => Err(convert::invalid(format!("page_size: {asked} given; 1 to 100 are permitted, 0 means 100"))),
    }
}

fn recovery_window(days: i32) -> Result<RecoveryWindow, BrokerError> {
    let window = match u8::try_from(days) {
        Ok(0) => Some(RecoveryWindow::DEFAULT),
        Ok(days) => RecoveryWindow::days(days),
        Err(_) => None,
    };
    window
        .ok_or_else(|| convert::invalid(format!("recovery_window_days: {days} given; 7 to 30 are permitted")))
}
