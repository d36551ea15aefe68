//! `RotationService`.

mod follow;
mod wire;

use std::sync::Arc;

use tonic::{Request, Response, Status};

use self::follow::{Following, Steps};
use self::wire::{Counts, listed, step, whole};
use super::secrets::{Said, answer};
use super::{Changes, convert};
use crate::broker::{Broker, BrokerError};
use crate::proto::v1::{self, rotation_service_server::RotationService};
use crate::rotation::engine::Told;
use crate::rotation::service::{Due, Rotations};
use crate::secret::{SecretId, SecretName};

/// The service.
pub(super) struct RotationDoor {
    broker: Arc<Broker>,
    rotations: Arc<Rotations>,
    changes: Changes,
}

impl RotationDoor {
    pub(super) const fn new(broker: Arc<Broker>, rotations: Arc<Rotations>, changes: Changes) -> Self {
        Self { broker, rotations, changes }
    }
}

macro_rules! said {
    () => {
        |q| Said { reason: &q.reason, environment: &q.environment, name: &q.name }
    };
}

#[tonic::async_trait]
impl RotationService for RotationDoor {
    async fn set_rotation(
        &self,
        request: Request<v1::SetRotationRequest>,
    ) -> Result<Response<v1::SetRotationResponse>, Status> {
        answer(&self.broker, request, "set_rotation", said!(), |call, q| {
            let id = convert::secret_id(&q.environment, &q.name)?;
            let definition = definition(q.definition)?;
            let rotations = Arc::clone(&self.rotations);
            Ok(self.changes.run(async move {
                let rotation = Some(whole(rotations.set(&call, id, &definition).await?)?);
                Ok(v1::SetRotationResponse { rotation })
            }))
        })
        .await
    }

    async fn remove_rotation(
        &self,
        request: Request<v1::RemoveRotationRequest>,
    ) -> Result<Response<v1::RemoveRotationResponse>, Status> {
        answer(&self.broker, request, "remove_rotation", said!(), |call, q| {
            let id = convert::secret_id(&q.environment, &q.name)?;
            let rotations = Arc::clone(&self.rotations);
            Ok(self.changes.run(async move {
                rotations.remove(&call, id).await?;
                Ok(v1::RemoveRotationResponse {})
            }))
        })
        .await
    }

    async fn get_rotation(
        &self,
        request: Request<v1::GetRotationRequest>,
    ) -> Result<Response<v1::GetRotationResponse>, Status> {
        answer(&self.broker, request, "get_rotation", said!(), |call, q| {
            let id = convert::secret_id(&q.environment, &q.name)?;
            Ok(async move {
                let rotation = Some(whole(self.rotations.get(&call, id).await?)?);
                Ok(v1::GetRotationResponse { rotation })
            })
        })
        .await
    }

    async fn list_rotations(
        &self,
        request: Request<v1::ListRotationsRequest>,
    ) -> Result<Response<v1::ListRotationsResponse>, Status> {
        answer(
            &self.broker,
            request,
            "list_rotations",
            |q| Said { reason: &q.reason, environment: &q.environment, name: "" },
            |call, q| {
                let environment = convert::environment(&q.environment)?;
                let (after, limit) = (after(&q.page_token)?, page_size(q.page_size)?);
                Ok(async move {
                    let page = self.rotations.list(&call, environment, after, limit).await?;
                    let last = page.rotations.last().filter(|_| page.more);
                    Ok(v1::ListRotationsResponse {
                        next_page_token: last.map(|last| last.id.name.to_string()).unwrap_or_default(),
                        rotations: page.rotations.into_iter().map(listed).collect(),
                    })
                })
            },
        )
        .await
    }

    async fn pause_rotation(
        &self,
        request: Request<v1::PauseRotationRequest>,
    ) -> Result<Response<v1::PauseRotationResponse>, Status> {
        answer(&self.broker, request, "pause_rotation", said!(), |call, q| {
            let id = convert::secret_id(&q.environment, &q.name)?;
            let rotations = Arc::clone(&self.rotations);
            Ok(self.changes.run(async move {
                let rotation = Some(whole(rotations.pause(&call, id).await?)?);
                Ok(v1::PauseRotationResponse { rotation })
            }))
        })
        .await
    }

    async fn resume_rotation(
        &self,
        request: Request<v1::ResumeRotationRequest>,
    ) -> Result<Response<v1::ResumeRotationResponse>, Status> {
        answer(&self.broker, request, "resume_rotation", said!(), |call, q| {
            let id = convert::secret_id(&q.environment, &q.name)?;
            let rotations = Arc::clone(&self.rotations);
            Ok(self.changes.run(async move {
                let rotation = Some(whole(rotations.resume(&call, id).await?)?);
                Ok(v1::ResumeRotationResponse { rotation })
            }))
        })
        .await
    }

    async fn abort_rotation(
        &self,
        request: Request<v1::AbortRotationRequest>,
    ) -> Result<Response<v1::AbortRotationResponse>, Status> {
        answer(&self.broker, request, "abort_rotation", said!(), |call, q| {
            let id = convert::secret_id(&q.environment, &q.name)?;
            let rotations = Arc::clone(&self.rotations);
            Ok(self.changes.run(async move {
                let rotation = Some(whole(rotations.abort(&call, id).await?)?);
                Ok(v1::AbortRotationResponse { rotation })
            }))
        })
        .await
    }

    type RotateStream = Steps<v1::RotateResponse>;

    async fn rotate(
        &self,
        request: Request<v1::RotateRequest>,
    ) -> Result<Response<Self::RotateStream>, Status> {
        answer(&self.broker, request, "rotate", said!(), |call, q| {
            let id = convert::secret_id(&q.environment, &q.name)?;
            let rotations = Arc::clone(&self.rotations);
            let request_id = call.request_id.clone();
            Ok(async move {
                let following = Following::of(
                    |(id, told): (SecretId, Told)| v1::RotateResponse { step: Some(step(&id, told)) },
                    move |tell| async move {
                        let over = rotations.rotate(call, id.clone(), q.wait, tell).await?;
                        Ok(Some(v1::RotateResponse { step: Some(step(&id, Told::Over(over))) }))
                    },
                );
                following.stream(request_id).await
            })
        })
        .await
    }

    type RotateDueStream = Steps<v1::RotateDueResponse>;

    async fn rotate_due(
        &self,
        request: Request<v1::RotateDueRequest>,
    ) -> Result<Response<Self::RotateDueStream>, Status> {
        answer(
            &self.broker,
            request,
            "rotate_due",
            |q| Said { reason: &q.reason, environment: &q.environment, name: "" },
            |call, q| {
                let environment = match q.environment.as_str() {
                    "" => None,
                    text => Some(convert::environment(text)?),
                };
                let rotations = Arc::clone(&self.rotations);
                let request_id = call.request_id.clone();
                Ok(async move {
                    let mut counts = Counts::default();
                    let following = Following::of(
                        move |due: Due| counts.say(due),
                        move |tell| async move {
                            rotations.rotate_due(call, environment, q.dry_run, tell).await?;
                            Ok(None)
                        },
                    );
                    following.stream(request_id).await
                })
            },
        )
        .await
    }
}

/// Checks the bound; what is in it is the rotation's business.
fn definition(text: String) -> Result<String, BrokerError> {
    const MOST: usize = 64 * 1024;
    match text.len() {
        0 => Err(convert::invalid("definition: is empty; name a rotator and a schedule")),
        1..=MOST => Ok(text),
        given => {
            let message = format!("definition: {given} bytes given; at most {MOST} are permitted");
            Err(convert::invalid(message))
        }
    }
}

fn page_size(asked: i32) -> Result<usize, BrokerError> {
    match usize::try_from(asked) {
        Ok(0) => Ok(100),
        Ok(size @ 1..=100) => Ok(size),
        _ => Err(convert::invalid(format!("page_size: {asked} given; 1 to 100 are permitted, 0 means 100"))),
    }
}

fn after(page_token: &str) -> Result<Option<SecretName>, BrokerError> {
    let parse = |text| {
        SecretName::parse(text)
            .map_err(|_| convert::invalid("page_token: is not one of this list's; begin without one"))
    };
    (!page_token.is_empty()).then_some(page_token).map(parse).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned as _};

    #[test]
    fn pages_and_definitions_have_bounds() {
        assert_eq!((page_size(0).unwrap(), page_size(1).unwrap(), page_size(100).unwrap()), (100, 1, 100));
        for bad in [-1, 101] {
            assert_eq!(page_size(bad).unwrap_err().reason(), Reason::InvalidArgument);
        }
        assert_eq!(after("").unwrap(), None);
        assert_eq!(after("team/db").unwrap().unwrap().as_str(), "team/db");
        assert_eq!(after("a//b").unwrap_err().reason(), Reason::InvalidArgument);
        assert_eq!(definition("x".repeat(64 * 1024)).unwrap().len(), 64 * 1024);
        for bad in [String::new(), "x".repeat(64 * 1024 + 1)] {
            assert_eq!(definition(bad).unwrap_err().reason(), Reason::InvalidArgument);
        }
    }
}
