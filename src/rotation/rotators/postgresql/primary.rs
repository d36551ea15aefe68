//! Finding the server that takes writes, and seeing that it is the right one.

use std::net::SocketAddr;

use super::credential::Credential;
use super::session::{Door, NoAnswer, NoSession, Row, Session};
use super::settings::{Place, Settings};
use super::{failed, statements};
use crate::rotation::{Failure, Trouble};

/// The admin's session with the primary.
pub(super) struct Primary<'a> {
    pub(super) session: Session,
    settings: &'a Settings,
    place: &'a Place,
    /// The cluster's system identifier.
    pub(super) identifier: String,
}

/// What a server says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Observed {
    pub(super) is_standby: bool,
    pub(super) identifier: String,
}

/// What was found at the hosts that are not the primary. The worst counts.
#[derive(Default)]
struct Others {
    standby: Option<String>,
    unavailable: Option<String>,
    person: Option<Failure>,
}

impl<'a> Primary<'a> {
    /// Logs in as the admin at each host in turn, up to the one that is not a standby. `fingerprint`: which cluster it
    /// was before, where that is known.
    pub(super) async fn find(
        settings: &'a Settings,
        admin: &Credential,
        fingerprint: Option<&str>,
    ) -> Result<Self, Failure> {
        let mut others = Others::default();
        for place in &settings.hosts {
            let mut session = match Session::open(&door(settings, place, None), admin).await {
                Ok(session) => session,
                Err(failure) => {
                    others.note(failure);
                    continue;
                }
            };
            let observed = match observe(&mut session).await {
                Ok(observed) => observed,
                Err(NoAnswer::Lost(why)) => {
                    others.unavailable = Some(format!("{place}: {why}"));
                    continue;
                }
                Err(answer) => return Err(failed(answer, "read pg_control_system()")),
            };
            belongs(settings, fingerprint, place, &observed)?;
            if observed.is_standby {
                others.standby = Some(place.to_string());
                session.end().await;
                continue;
            }
            let settle = session.query(statements::SETTLE).await;
            settle.map_err(|answer| failed(answer, "begin its session"))?;
            return Ok(Self { session, settings, place, identifier: observed.identifier });
        }
        Err(others.failure())
    }

    /// Where the primary is, for another login there: the same address, and so the same server.
    pub(super) fn door(&self) -> Door<'a> {
        door(self.settings, self.place, Some(self.session.address()))
    }
}

impl Others {
    fn note(&mut self, failure: NoSession) {
        let person = |trouble, message: String| Some(Failure::new(trouble, message));
        match failure {
            NoSession::Unavailable(why) => self.unavailable = Some(why),
            NoSession::Rejected(why) => {
                self.person = person(Trouble::AdminRejected, format!("the admin is rejected: {why}"));
            }
            NoSession::Unverifiable(why) => {
                self.person =
                    person(Trouble::Unverifiable, format!("the admin's login proves nothing: {why}"));
            }
            NoSession::Admitted(error) if error.code == "42501" => {
                self.person = person(Trouble::PrivilegeMissing, format!("the admin can't connect: {error}"));
            }
            NoSession::Admitted(error) => {
                self.person = person(Trouble::ValueUnfit, format!("`database` in the definition: {error}"));
            }
        }
    }

    /// A host that can't be reached may be the primary; so only where all can, there is none.
    fn failure(self) -> Failure {
        match (self.person, self.unavailable, self.standby) {
            (Some(failure), _, _) => failure,
            (None, Some(why), _) => Failure::new(Trouble::TargetUnavailable, why),
            (None, None, Some(place)) => Failure::new(
                Trouble::TargetReadOnly,
                format!("{place} is a standby, and so is every other host"),
            ),
            (None, None, None) => Failure::new(Trouble::Defect, "a definition without hosts"),
        }
    }
}

pub(super) fn door<'a>(settings: &'a Settings, place: &'a Place, address: Option<SocketAddr>) -> Door<'a> {
    Door { place, address, encryption: &settings.encryption, database: &settings.database }
}

/// Asks a server whether it is a standby, and of which cluster.
pub(super) async fn observe(session: &mut Session) -> Result<Observed, NoAnswer> {
    let rows = session.query(statements::OBSERVE).await?;
    let columns = rows.first().map(Row::as_slice);
    match columns {
        Some([Some(standby), Some(identifier)]) => {
            Ok(Observed { is_standby: standby != "f", identifier: identifier.clone() })
        }
        _ => Err(NoAnswer::Lost("the server did not say what it is".to_owned())),
    }
}

/// Whether a server is of the cluster that is rotated.
pub(super) fn belongs(
    settings: &Settings,
    fingerprint: Option<&str>,
    place: &Place,
    observed: &Observed,
) -> Result<(), Failure> {
    let found = &observed.identifier;
    for expected in [settings.system_identifier.as_deref(), fingerprint].into_iter().flatten() {
        if expected != found {
            return Err(Failure::new(
                Trouble::WrongTarget,
                format!(
                    "{place} has the system identifier {found}, and not {expected}: it is another cluster"
                ),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::rotators::postgresql::session::ServerError;

    fn noted(failures: Vec<NoSession>, standby: bool) -> Trouble {
        let mut others = Others { standby: standby.then(|| "h:1".to_owned()), ..Others::default() };
        failures.into_iter().for_each(|failure| others.note(failure));
        others.failure().trouble
    }

    #[test]
    fn only_standbys_make_a_target_read_only() {
        let down = || NoSession::Unavailable("h:1: refused".to_owned());
        assert_eq!(noted(vec![], true), Trouble::TargetReadOnly);
        assert_eq!(noted(vec![down()], true), Trouble::TargetUnavailable);
        assert_eq!(noted(vec![down()], false), Trouble::TargetUnavailable);
        assert_eq!(noted(vec![down(), NoSession::Rejected("no".to_owned())], true), Trouble::AdminRejected);
        assert_eq!(noted(vec![NoSession::Unverifiable("trust".to_owned())], false), Trouble::Unverifiable);
        let error = |code: &str| ServerError { code: code.to_owned(), message: "no".to_owned() };
        assert_eq!(noted(vec![NoSession::Admitted(error("3D000"))], false), Trouble::ValueUnfit);
        assert_eq!(noted(vec![NoSession::Admitted(error("42501"))], false), Trouble::PrivilegeMissing);
    }
}
