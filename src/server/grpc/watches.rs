//! `SecretService`'s watch, and who runs on which version.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::Stream;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::secrets::{Said, answer};
use super::status::{problem, status};
use super::{Changes, convert, rejected};
use crate::broker::consumers::{Consumer, ConsumerName, VersionInUse};
use crate::broker::watch::{Event, MAX_NAMES, Subject, Told, WatchRequest, Watching};
use crate::broker::{Broker, BrokerError};
use crate::environment::NamePattern;
use crate::proto::v1::{self, watch_secrets_response};
use crate::secret::SecretName;
use crate::server::told;

/// The stream of one watch. It works only while it is polled, which the transport does only while the other side
/// reads: HTTP/2's flow control is what keeps a slow reader from costing more than its seat.
pub(super) type Watch = Pin<Box<dyn Stream<Item = Result<v1::WatchSecretsResponse, Status>> + Send>>;

pub(super) async fn watch_secrets(
    broker: &Arc<Broker>,
    shutdown: watch::Receiver<bool>,
    request: Request<v1::WatchSecretsRequest>,
) -> Result<Response<Watch>, Status> {
    answer(
        broker,
        request,
        "watch",
        |q| Said { reason: &q.reason, environment: &q.environment, name: only(&q.names) },
        |call, q| {
            let asked = parse(q)?;
            let request_id = call.request_id.clone();
            Ok(async move {
                let watching = broker.watch(&call, asked).await?;
                Ok(stream(watching, request_id, shutdown))
            })
        },
    )
    .await
}

pub(super) async fn report_version_in_use(
    broker: &Arc<Broker>,
    changes: &Changes,
    request: Request<v1::ReportVersionInUseRequest>,
) -> Result<Response<v1::ReportVersionInUseResponse>, Status> {
    answer(
        broker,
        request,
        "report_version",
        |q| Said { reason: &q.reason, environment: &q.environment, name: &q.name },
        |call, q| {
            let said = VersionInUse {
                id: convert::secret_id(&q.environment, &q.name)?,
                consumer: ConsumerName::parse(&q.consumer)?,
                version_id: convert::version_id(&q.version_id)?,
            };
            let broker = Arc::clone(broker);
            Ok(changes.run(async move {
                let current = broker.report_version_in_use(&call, said).await?;
                Ok(v1::ReportVersionInUseResponse { current })
            }))
        },
    )
    .await
}

pub(super) async fn list_consumers(
    broker: &Arc<Broker>,
    request: Request<v1::ListConsumersRequest>,
) -> Result<Response<v1::ListConsumersResponse>, Status> {
    answer(
        broker,
        request,
        "list_consumers",
        |q| Said { reason: &q.reason, environment: &q.environment, name: &q.name },
        |call, q| {
            let id = convert::secret_id(&q.environment, &q.name)?;
            Ok(async move {
                let consumers = broker.consumers(&call, id).await?;
                Ok(v1::ListConsumersResponse { consumers: consumers.into_iter().map(consumer).collect() })
            })
        },
    )
    .await
}

/// The name that a request is about, where it is one.
fn only(names: &[String]) -> &str {
    match names {
        [only] => only,
        _ => "",
    }
}

fn parse(q: v1::WatchSecretsRequest) -> Result<WatchRequest, BrokerError> {
    Ok(WatchRequest {
        environment: convert::environment(&q.environment)?,
        subject: subject(&q.names, q.prefix)?,
        consumer: ConsumerName::parse(&q.consumer)?,
        after: q.after_revision,
        with_values: q.with_values,
    })
}

fn subject(names: &[String], prefix: String) -> Result<Subject, BrokerError> {
    if names.is_empty() {
        NamePattern::parse(&format!("{prefix}*"))
            .map_err(|problem| convert::invalid(format!("prefix: {problem}")))?;
        return Ok(Subject::Prefix(prefix));
    }
    if !prefix.is_empty() {
        return Err(convert::invalid("names and prefix exclude each other; give one"));
    }
    if names.len() > MAX_NAMES {
        let message = format!("names: {} given; a watch has 1 to {MAX_NAMES}, or a prefix", names.len());
        return Err(convert::invalid(message));
    }
    let parsed: Result<BTreeSet<_>, _> = names.iter().map(|name| SecretName::parse(name)).collect();
    parsed.map(Subject::Names).map_err(|error| rejected(&error))
}

/// Asks for one thing after the other, until there is an error, which is the last thing that is said. A reader that is
/// gone drops the stream, and with it the seat.
fn stream(watching: Watching, request_id: Arc<str>, shutdown: watch::Receiver<bool>) -> Watch {
    Box::pin(futures_util::stream::unfold(Some(watching), move |watching| {
        let (request_id, shutdown) = (request_id.clone(), shutdown.clone());
        async move {
            let mut watching = watching?;
            match watching.next(told(shutdown)).await {
                Ok(told) => Some((Ok(response(told)), Some(watching))),
                Err(error) => Some((Err(status(&error, &request_id)), None)),
            }
        }
    }))
}

fn response(told: Told) -> v1::WatchSecretsResponse {
    use watch_secrets_response::Event as Wire;
    let event = match told.event {
        Event::Started { secrets } => {
            Wire::Started(v1::WatchStarted { secrets: i32::try_from(secrets).unwrap_or(i32::MAX) })
        }
        Event::Changed { secret, skipped } => {
            // What a watch leaves out was not asked for; nothing is known of what the caller has.
            let secret = v1::Secret { unchanged: false, ..convert::secret(secret) };
            Wire::Changed(v1::SecretChanged { secret: Some(secret), skipped })
        }
        Event::Gone(id) => {
            Wire::Gone(v1::SecretGone { environment: id.environment.to_string(), name: id.name.to_string() })
        }
        Event::Problem { id, error } => Wire::Problem(v1::WatchProblem {
            environment: id.environment.to_string(),
            name: id.name.to_string(),
            problem: Some(problem(&error)),
        }),
        Event::Progress => Wire::Progress(v1::WatchProgress {}),
    };
    v1::WatchSecretsResponse { revision: told.revision, event: Some(event) }
}

fn consumer(consumer: Consumer) -> v1::Consumer {
    let (version_id, since, reported_at) = match consumer.reported {
        Some(said) => (said.version_id.to_string(), Some(said.since), Some(said.reported_at)),
        None => (String::new(), None, None),
    };
    v1::Consumer {
        name: consumer.name.to_string(),
        principal: consumer.principal,
        version_id,
        since: since.map(convert::timestamp),
        reported_at: reported_at.map(convert::timestamp),
        current: consumer.current,
        watching: consumer.watching,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reasoned as _;

    fn request(names: &[&str], prefix: &str, consumer: &str) -> v1::WatchSecretsRequest {
        v1::WatchSecretsRequest {
            environment: "production".to_owned(),
            names: names.iter().map(ToString::to_string).collect(),
            prefix: prefix.to_owned(),
            consumer: consumer.to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn a_watch_has_names_or_a_prefix() {
        let asked = parse(request(&["b", "a", "b"], "", "orders")).unwrap();
        let names = ["a", "b"].map(|name| SecretName::parse(name).unwrap());
        assert_eq!(asked.subject, Subject::Names(BTreeSet::from(names)));
        assert_eq!(
            parse(request(&[], "team/", "orders")).unwrap().subject,
            Subject::Prefix("team/".to_owned())
        );
        assert_eq!(parse(request(&[], "", "orders")).unwrap().subject, Subject::Prefix(String::new()));
        let many: Vec<_> = (0..=MAX_NAMES).map(|n| format!("s{n}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        for (bad, code) in [
            (request(&["a"], "a", "orders"), "INVALID_ARGUMENT"),
            (request(&["a//b"], "", "orders"), "INVALID_NAME"),
            (request(&[], "a b", "orders"), "INVALID_ARGUMENT"),
            (request(&["a"], "", ""), "INVALID_ARGUMENT"),
            (request(&["a"], "", "two words"), "INVALID_ARGUMENT"),
            (request(&many, "", "orders"), "INVALID_ARGUMENT"),
        ] {
            assert_eq!(parse(bad).unwrap_err().reason().code(), code);
        }
    }

    #[test]
    fn a_request_about_one_secret_names_it_on_record() {
        assert_eq!(only(&["a".to_owned()]), "a");
        assert_eq!(only(&["a".to_owned(), "b".to_owned()]), "");
        assert_eq!(only(&[]), "");
    }
}
