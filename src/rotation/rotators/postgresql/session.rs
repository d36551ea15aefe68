//! A session with a server: our own small client, because of what it has to know about a login.
//!
//! ```text
//! TCP ─▶ SSLRequest ─▶ S: TLS ─▶ startup ─▶ SASL SCRAM-SHA-256 ─▶ proof ─▶ the server's own signature ─▶ ready
//!                      N: end              else: unverifiable,             else: unverifiable
//!                                          and nothing is sent
//!
//!                           the server offers …-PLUS        it does not
//! over TLS                  bound to its certificate (p=)   "I could have bound it" (y)
//! without (loopback alone)  not bound (n)                   not bound (n)
//! ```
//!
//! A login proves that a password is right only where the server demanded SCRAM-SHA-256 and then showed, by the
//! signature in its last message, that it knows the password's verifier (RFC 5802, section 3). Anything else (`trust`,
//! `password`, `md5`, `peer`, GSSAPI) would let in, or be shown, what proves nothing. A password is never sent. From a
//! proof it can be guessed, each guess at the price of the hash's iterations; so a server that asks for fewer than
//! RFC 7677 does is sent none.
//!
//! The certificate shows that a server may call itself by its host's name, not that it is the database's. One that only
//! passes on what it hears would be logged in at the real server in the admin's place. Over TLS a login is therefore
//! bound to the certificate that was seen (`tls-server-end-point`, RFC 5929): the real server, which has another one,
//! refuses; and where the offer was taken out on the way, it sees from the `y` that somebody did that. A certificate that
//! can't be bound to (Ed25519) at a server that offers binding gets no login at all. What remains: a real server that
//! also takes logins without TLS from elsewhere offers no binding there, so that a login can be passed on to it;
//! `hostssl` in place of `host` in its `pg_hba.conf` ends that.
//!
//! What is written here was learnt from the PostgreSQL documentation, chapter "Frontend/Backend Protocol".

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::BytesMut;
use fallible_iterator::FallibleIterator as _;
use postgres_protocol::authentication::sasl::{
    ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256,
};
use postgres_protocol::message::backend::{
    AuthenticationSaslBody, DataRowBody, ErrorResponseBody, Header, Message,
};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use super::credential::Credential;
use super::settings::{Encryption, Place};
use super::tls;
use super::verifier;

const CONNECT: Duration = Duration::from_secs(5);
/// TLS and the login together.
const LOGIN: Duration = Duration::from_secs(10);
/// Longer than the server's own bound, which an admin's session sets.
const STATEMENT: Duration = Duration::from_secs(10);
/// How long a polite end may take.
const GOODBYE: Duration = Duration::from_secs(1);
/// The largest message that is read. What is asked for is small.
const LARGEST_MESSAGE: i32 = 1024 * 1024;
const MOST_ROWS: usize = 1_000;
/// RFC 7677, section 4.
const FEWEST_ITERATIONS: u32 = 4_096;
/// A server's message is cut behind so many characters, and a line that holds one behind twice as many.
const LONGEST_MESSAGE: usize = 200;
const APPLICATION: &str = "claviger";

/// Where to log in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Door<'a> {
    pub(super) place: &'a Place,
    /// Where its name led before: a name may lead elsewhere the next time.
    pub(super) address: Option<SocketAddr>,
    pub(super) encryption: &'a Encryption,
    pub(super) database: &'a str,
}

/// Why there is no session. The texts are lines without any value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NoSession {
    /// The server checked the password, and definitely does not let in.
    Rejected(String),
    /// The server does not check the password in a way that proves anything.
    Unverifiable(String),
    /// The password is right, but there is no session to be had: no such database, or no right to connect to it.
    Admitted(ServerError),
    /// There is no telling.
    Unavailable(String),
}

impl fmt::Display for NoSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rejected(why) | Self::Unverifiable(why) | Self::Unavailable(why) => f.write_str(why),
            Self::Admitted(error) => write!(f, "{error}"),
        }
    }
}

/// What a server says for an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServerError {
    /// The SQLSTATE.
    pub(super) code: String,
    /// The primary message alone: context and detail may quote the statement.
    pub(super) message: String,
}

impl ServerError {
    fn read(body: &ErrorResponseBody) -> Self {
        let mut error = Self { code: String::new(), message: String::new() };
        let mut fields = body.fields();
        while let Ok(Some(field)) = fields.next() {
            let text = || String::from_utf8_lossy(field.value_bytes());
            match field.type_() {
                b'C' => error.code = text().chars().filter(char::is_ascii_alphanumeric).take(5).collect(),
                b'M' => error.message = legible(&text()).chars().take(LONGEST_MESSAGE).collect(),
                _ => {}
            }
        }
        if error.message.contains(verifier::PREFIX) {
            error.message = "(the message quotes the statement and is not shown)".to_owned();
        }
        error
    }

    /// Whether it is of class 28, "invalid authorization specification": 28P01, 28000.
    fn denies(&self) -> bool {
        self.code.starts_with("28")
    }
}

/// What a target wrote, as a line that people may be shown: nothing in it breaks the line, moves a cursor, hides, or
/// turns the direction of what follows.
pub(super) fn legible(text: &str) -> String {
    let shown = |c: char| match c {
        _ if c.is_control() => ' ',
        '\u{61c}'
        | '\u{180e}'
        | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{feff}' => char::REPLACEMENT_CHARACTER,
        _ => c,
    };
    text.chars().take(2 * LONGEST_MESSAGE).map(shown).collect()
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}

/// Why a statement was not done, or may have been.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NoAnswer {
    /// The server refused it: nothing of it was done.
    Refused(ServerError),
    /// The session is over. The statement may have been done.
    Lost(String),
}

/// A row's columns as text; `None` for NULL.
pub(super) type Row = Vec<Option<String>>;

trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// What a login goes over.
enum Channel {
    Plain,
    /// TLS, with what a login can be bound to.
    Tls(Option<Vec<u8>>),
}

/// How far a login has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The server has a user's name, and nothing else.
    Named,
    /// It has heard whether the client would bind the login.
    Begun,
    /// It has a proof.
    Proven,
}

/// A session in which the password was proven right.
pub(super) struct Session {
    wire: Box<dyn Wire>,
    incoming: BytesMut,
    address: SocketAddr,
}

impl Session {
    /// Logs in on a fresh connection.
    pub(super) async fn open(door: &Door<'_>, credential: &Credential) -> Result<Self, NoSession> {
        let opened = async {
            let (stream, address) = within(CONNECT, "connection", connect(door)).await?;
            let logged_in = async {
                let (wire, channel) = secured(stream, door).await?;
                let mut session = Self { wire, incoming: BytesMut::new(), address };
                session.log_in(door.database, credential, channel).await?;
                Ok::<_, NoSession>(session)
            };
            within(LOGIN, "login", logged_in).await
        };
        opened.await.map_err(|failure: NoSession| failure.at(door.place))
    }

    /// Where the server is.
    pub(super) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Runs statements, and gives the rows of all of them.
    pub(super) async fn query(&mut self, sql: &str) -> Result<Vec<Row>, NoAnswer> {
        match timeout(STATEMENT, self.exchange(sql)).await {
            Ok(Ok(answer)) => answer.map_err(NoAnswer::Refused),
            Ok(Err(error)) => Err(NoAnswer::Lost(format!("the session ended: {error}"))),
            Err(_) => Err(NoAnswer::Lost(format!("no answer within {} s", STATEMENT.as_secs()))),
        }
    }

    /// Says good-bye, so that the server does not log a lost client.
    pub(super) async fn end(mut self) {
        let mut goodbye = BytesMut::new();
        frontend::terminate(&mut goodbye);
        let polite = async {
            self.wire.write_all(&goodbye).await?;
            self.wire.shutdown().await
        };
        let _ = timeout(GOODBYE, polite).await;
    }

    async fn exchange(&mut self, sql: &str) -> io::Result<Result<Vec<Row>, ServerError>> {
        let mut query = BytesMut::new();
        frontend::query(sql, &mut query)?;
        self.send(&query).await?;
        let mut rows = Vec::new();
        let mut refused = None;
        loop {
            match self.receive().await? {
                Message::DataRow(_) if rows.len() >= MOST_ROWS => {
                    return Err(io::Error::other("too many rows"));
                }
                Message::DataRow(body) => rows.push(columns(&body)?),
                Message::ErrorResponse(body) => refused = Some(ServerError::read(&body)),
                Message::ReadyForQuery(_) => return Ok(refused.map_or(Ok(rows), Err)),
                _ => {}
            }
        }
    }

    async fn log_in(
        &mut self,
        database: &str,
        credential: &Credential,
        channel: Channel,
    ) -> Result<(), NoSession> {
        let parameters = [
            ("user", credential.username.as_str()),
            ("database", database),
            ("client_encoding", "UTF8"),
            ("application_name", APPLICATION),
        ];
        let mut startup = BytesMut::new();
        frontend::startup_message(parameters, &mut startup).map_err(|error| lost(&error))?;
        self.send(&startup).await.map_err(|error| lost(&error))?;
        let (mechanism, binding) = self.challenged(channel).await?;
        self.prove(credential, mechanism, binding).await?;
        self.settled().await
    }

    /// The server's demand, and how it is met. Until here it was told a name, and nothing else.
    async fn challenged(&mut self, channel: Channel) -> Result<(&'static str, ChannelBinding), NoSession> {
        let method = match self.next_of_login(Stage::Named).await? {
            Message::AuthenticationSasl(body) => return mechanism(&body, channel),
            Message::AuthenticationOk => "lets in without asking for a password (trust, peer or cert)",
            Message::AuthenticationCleartextPassword => {
                "wants the password itself (password, ldap, pam or radius)"
            }
            Message::AuthenticationMd5Password(_) => "wants an MD5 hash of the password",
            _ => "wants another proof than a password",
        };
        Err(unmet(method))
    }

    /// Both sides prove that they know the password.
    async fn prove(
        &mut self,
        credential: &Credential,
        mechanism: &str,
        binding: ChannelBinding,
    ) -> Result<(), NoSession> {
        let mut scram = ScramSha256::new(credential.password.as_bytes(), binding);
        let mut first = BytesMut::new();
        frontend::sasl_initial_response(mechanism, scram.message(), &mut first)
            .map_err(|error| lost(&error))?;
        self.send(&first).await.map_err(|error| lost(&error))?;
        match self.next_of_login(Stage::Begun).await? {
            Message::AuthenticationSaslContinue(body) => {
                is_costly(body.data())?;
                scram.update(body.data()).map_err(|error| unproven(&error.to_string()))?;
            }
            _ => return Err(unproven("it left the exchange")),
        }
        let mut second = BytesMut::new();
        frontend::sasl_response(scram.message(), &mut second).map_err(|error| lost(&error))?;
        self.send(&second).await.map_err(|error| lost(&error))?;
        match self.next_of_login(Stage::Proven).await? {
            Message::AuthenticationSaslFinal(body) => {
                scram.finish(body.data()).map_err(|error| unproven(&error.to_string()))
            }
            _ => Err(unproven("it left the exchange")),
        }
    }

    /// The password is right; what else there is to a login.
    async fn settled(&mut self) -> Result<(), NoSession> {
        loop {
            match self.receive().await.map_err(|error| lost(&error))? {
                Message::ReadyForQuery(_) => return Ok(()),
                Message::ErrorResponse(body) => return Err(admitted(ServerError::read(&body))),
                _ => {}
            }
        }
    }

    /// The next message but for notices.
    async fn next_of_login(&mut self, stage: Stage) -> Result<Message, NoSession> {
        loop {
            match self.receive().await.map_err(|error| lost(&error))? {
                Message::ErrorResponse(body) => return Err(denied(&ServerError::read(&body), stage)),
                Message::NoticeResponse(_) | Message::ParameterStatus(_) => {}
                message => return Ok(message),
            }
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.wire.write_all(bytes).await?;
        self.wire.flush().await
    }

    async fn receive(&mut self) -> io::Result<Message> {
        loop {
            if Header::parse(&self.incoming)?.is_some_and(|header| header.len() > LARGEST_MESSAGE) {
                return Err(io::Error::other("a message is too large, or no PostgreSQL message at all"));
            }
            if let Some(message) = Message::parse(&mut self.incoming)? {
                return Ok(message);
            }
            if self.wire.read_buf(&mut self.incoming).await? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"));
            }
        }
    }
}

impl NoSession {
    fn at(self, place: &Place) -> Self {
        let named = |why: String| format!("{place}: {why}");
        match self {
            Self::Rejected(why) => Self::Rejected(named(why)),
            Self::Unverifiable(why) => Self::Unverifiable(named(why)),
            Self::Unavailable(why) => Self::Unavailable(named(why)),
            Self::Admitted(error) => Self::Admitted(ServerError { message: named(error.message), ..error }),
        }
    }
}

async fn within<T>(
    limit: Duration,
    what: &str,
    work: impl Future<Output = Result<T, NoSession>>,
) -> Result<T, NoSession> {
    let late = |_| Err(NoSession::Unavailable(format!("no {what} within {} s", limit.as_secs())));
    timeout(limit, work).await.unwrap_or_else(late)
}

async fn connect(door: &Door<'_>) -> Result<(TcpStream, SocketAddr), NoSession> {
    let place = door.place;
    let addresses: Vec<SocketAddr> = match door.address {
        Some(address) => vec![address],
        None => lookup_host((place.host.as_str(), place.port))
            .await
            .map_err(|error| NoSession::Unavailable(format!("the name leads nowhere: {error}")))?
            .collect(),
    };
    let mut last = "the name leads nowhere".to_owned();
    for address in addresses {
        if *door.encryption == Encryption::Disabled && !address.ip().is_loopback() {
            last = format!("{address} is not of this machine, and `tls` is \"disable\"");
            continue;
        }
        match TcpStream::connect(address).await {
            Ok(stream) => {
                let _ = stream.set_nodelay(true);
                return Ok((stream, address));
            }
            Err(error) => last = format!("{address}: {error}"),
        }
    }
    Err(NoSession::Unavailable(last))
}

async fn secured(mut stream: TcpStream, door: &Door<'_>) -> Result<(Box<dyn Wire>, Channel), NoSession> {
    let Encryption::VerifyFull { ca_file } = door.encryption else {
        return Ok((Box::new(stream), Channel::Plain));
    };
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    stream.write_all(&request).await.map_err(|error| lost(&error))?;
    // One byte and no more: whatever came before TLS must not be taken for something said within.
    match stream.read_u8().await.map_err(|error| lost(&error))? {
        b'S' => {}
        b'N' => {
            return Err(NoSession::Unavailable("it takes no TLS, and nothing was sent without; turn on ssl there, or where it is this machine say `tls = \"disable\"`"
                    .to_owned()));
        }
        _ => return Err(NoSession::Unavailable("what answers there is no PostgreSQL server".to_owned())),
    }
    let secured = tls::secure(stream, &door.place.host, ca_file.as_deref()).await;
    let secured = secured.map_err(NoSession::Unavailable)?;
    let channel = Channel::Tls(tls::end_point(&secured));
    Ok((Box::new(secured), channel))
}

/// Which of the offered mechanisms is taken, and what is said of binding it to the channel.
fn mechanism(
    body: &AuthenticationSaslBody,
    channel: Channel,
) -> Result<(&'static str, ChannelBinding), NoSession> {
    let offers = |name: &str| body.mechanisms().any(|mechanism| Ok(mechanism == name)).unwrap_or(false);
    match (channel, offers(SCRAM_SHA_256_PLUS), offers(SCRAM_SHA_256)) {
        (Channel::Tls(Some(hash)), true, _) => {
            Ok((SCRAM_SHA_256_PLUS, ChannelBinding::tls_server_end_point(hash)))
        }
        // The server would refuse a `y` after its own offer, and an `n` could be passed on to another one.
        (Channel::Tls(None), true, _) => Err(NoSession::Unverifiable(
            "its certificate's signature is of a kind (Ed25519) to which a login can't be bound, and it was sent no \
             proof; have it show one that is signed with ECDSA or RSA"
                .to_owned(),
        )),
        (Channel::Tls(_), false, true) => Ok((SCRAM_SHA_256, ChannelBinding::unrequested())),
        (Channel::Plain, _, true) => Ok((SCRAM_SHA_256, ChannelBinding::unsupported())),
        (_, _, false) => Err(unmet("wants a SASL mechanism other than SCRAM-SHA-256")),
    }
}

/// Whether guessing the password from a proof is made as costly as it has to be. `message`: `r=…,s=…,i=4096` (RFC 5802,
/// section 7); what is not like that, the exchange itself refuses.
fn is_costly(message: &[u8]) -> Result<(), NoSession> {
    let text = String::from_utf8_lossy(message);
    let asked = text.split(',').find_map(|part| part.strip_prefix("i=")?.parse::<u32>().ok());
    match asked {
        Some(asked) if asked < FEWEST_ITERATIONS => Err(NoSession::Unverifiable(format!(
            "it asks for {asked} iterations of the hash, from which a password is too easily guessed, and was sent no \
             proof; where it is the right server, set this role's password anew with {FEWEST_ITERATIONS} or more \
             (scram_iterations)"
        ))),
        _ => Ok(()),
    }
}

/// What an error before the server's signature means. It is about the password only where a proof was sent before: else
/// it is about `pg_hba.conf`, or the exchange.
fn denied(error: &ServerError, stage: Stage) -> NoSession {
    match (stage, error.code.as_str()) {
        (Stage::Proven, "28P01") => NoSession::Rejected(error.to_string()),
        // "SCRAM channel binding check failed", "SCRAM channel binding negotiation error".
        (Stage::Begun | Stage::Proven, "28000") => NoSession::Unverifiable(format!(
            "{error}: what answers there may not be the server itself, but something that passes on what it hears"
        )),
        _ => NoSession::Unavailable(error.to_string()),
    }
}

/// What an error after the server's signature means.
fn admitted(error: ServerError) -> NoSession {
    match error.code.as_str() {
        // No such database; no right to connect to it.
        "3D000" | "42501" => NoSession::Admitted(error),
        // The role may not log in (any more).
        _ if error.denies() => NoSession::Rejected(error.to_string()),
        _ => NoSession::Unavailable(error.to_string()),
    }
}

fn unmet(demand: &str) -> NoSession {
    NoSession::Unverifiable(format!("it {demand}, and was sent no proof"))
}

/// `problem` may quote the server.
fn unproven(problem: &str) -> NoSession {
    NoSession::Unverifiable(format!("it did not prove that it knows the password: {}", legible(problem)))
}

fn lost(error: &io::Error) -> NoSession {
    NoSession::Unavailable(format!("the connection failed: {error}"))
}

fn columns(body: &DataRowBody) -> io::Result<Row> {
    let column = |range: Option<std::ops::Range<usize>>| {
        let bytes = range.and_then(|range| body.buffer().get(range));
        Ok(bytes.map(|bytes| String::from_utf8_lossy(bytes).into_owned()))
    };
    body.ranges().map(column).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;
    use zeroize::Zeroizing;

    /// Longer than anything here may take.
    const HUNG: Duration = Duration::from_secs(60);

    fn credential() -> Credential {
        Credential { username: "app".to_owned(), password: Zeroizing::new("canary-5f3a".to_owned()) }
    }

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap();
        [&[tag][..], length.to_be_bytes().as_slice(), body].concat()
    }

    fn error(code: &str) -> Vec<u8> {
        message(b'E', format!("SFATAL\0C{code}\0Mno\0\0").as_bytes())
    }

    fn sasl(mechanism: &str) -> Vec<u8> {
        message(b'R', &[&[0, 0, 0, 10][..], mechanism.as_bytes(), b"\0\0"].concat())
    }

    /// A server that says this, a line after each message that it hears; gives what the client made of it and all that
    /// it said.
    async fn against(lines: Vec<Vec<u8>>) -> (NoSession, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let place = Place { host: "127.0.0.1".to_owned(), port: listener.local_addr().unwrap().port() };
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut heard = Vec::new();
            for line in lines {
                let mut buffer = [0; 4_096];
                let count = stream.read(&mut buffer).await.unwrap();
                heard.extend_from_slice(&buffer[..count]);
                stream.write_all(&line).await.unwrap();
            }
            let _ = stream.read_to_end(&mut heard).await;
            heard
        });
        let door = Door { place: &place, address: None, encryption: &Encryption::Disabled, database: "shop" };
        let answer = timeout(HUNG, Session::open(&door, &credential())).await.unwrap();
        (answer.err().unwrap(), timeout(HUNG, server).await.unwrap().unwrap())
    }

    #[tokio::test]
    async fn r22_no_password_is_shown_to_who_does_not_ask_rightly() {
        for demand in [
            message(b'R', &[0, 0, 0, 0]),
            message(b'R', &[0, 0, 0, 3]),
            message(b'R', &[0, 0, 0, 5, 1, 2, 3, 4]),
            message(b'R', &[0, 0, 0, 7]),
            sasl("SCRAM-SHA-1"),
            sasl(SCRAM_SHA_256_PLUS),
        ] {
            let (failure, heard) = against(vec![demand]).await;
            assert!(matches!(failure, NoSession::Unverifiable(_)), "{failure:?}");
            // The start-up message, and nothing after it.
            let length = u32::from_be_bytes(*heard.first_chunk().unwrap());
            assert_eq!(usize::try_from(length).unwrap(), heard.len());
        }
    }

    #[tokio::test]
    async fn an_error_before_a_proof_is_no_rejection() {
        for code in ["28000", "28P01", "57P03", "53300", "3D000", "08P01", "58000"] {
            let (failure, _) = against(vec![error(code)]).await;
            assert!(matches!(failure, NoSession::Unavailable(_)), "{code}: {failure:?}");
            let (failure, _) = against(vec![sasl(SCRAM_SHA_256), error(code)]).await;
            let bound_wrongly = code == "28000";
            assert_eq!(matches!(failure, NoSession::Unverifiable(_)), bound_wrongly, "{code}: {failure:?}");
            assert_eq!(matches!(failure, NoSession::Unavailable(_)), !bound_wrongly, "{code}: {failure:?}");
        }
    }

    #[test]
    fn only_a_wrong_password_is_a_rejection() {
        let error = |code: &str| ServerError { code: code.to_owned(), message: "no".to_owned() };
        assert!(matches!(denied(&error("28P01"), Stage::Proven), NoSession::Rejected(_)));
        assert!(matches!(denied(&error("28P01"), Stage::Begun), NoSession::Unavailable(_)));
        assert!(matches!(denied(&error("28000"), Stage::Named), NoSession::Unavailable(_)));
        for stage in [Stage::Begun, Stage::Proven] {
            assert!(matches!(denied(&error("28000"), stage), NoSession::Unverifiable(_)));
        }
    }

    #[test]
    fn a_login_over_tls_is_bound_where_that_is_offered() {
        let chosen = |offered: &[&str], channel| {
            let names: Vec<u8> = offered.iter().flat_map(|name| [name.as_bytes(), b"\0"].concat()).collect();
            let mut incoming =
                BytesMut::from(message(b'R', &[&[0, 0, 0, 10][..], &names, b"\0"].concat()).as_slice());
            let Ok(Some(Message::AuthenticationSasl(body))) = Message::parse(&mut incoming) else {
                panic!("an offer")
            };
            let (name, binding) = mechanism(&body, channel).ok()?;
            let first = ScramSha256::new(b"", binding).message().to_vec();
            let header = String::from_utf8(first).unwrap().split_once("n=").unwrap().0.to_owned();
            Some((name, header))
        };
        let both = [SCRAM_SHA_256_PLUS, SCRAM_SHA_256];
        let bound = || Channel::Tls(Some(vec![1; 32]));
        let said = |name, header: &str| Some((name, header.to_owned()));
        assert_eq!(chosen(&both, bound()), said(SCRAM_SHA_256_PLUS, "p=tls-server-end-point,,"));
        assert_eq!(chosen(&both[..1], bound()), said(SCRAM_SHA_256_PLUS, "p=tls-server-end-point,,"));
        assert_eq!(chosen(&both[1..], bound()), said(SCRAM_SHA_256, "y,,"));
        assert_eq!(chosen(&both, Channel::Tls(None)), None);
        assert_eq!(chosen(&both[1..], Channel::Tls(None)), said(SCRAM_SHA_256, "y,,"));
        assert_eq!(chosen(&both, Channel::Plain), said(SCRAM_SHA_256, "n,,"));
        assert_eq!(chosen(&["SCRAM-SHA-1"], bound()), None);
    }

    #[tokio::test]
    async fn who_asks_for_a_cheap_hash_gets_no_proof() {
        for iterations in ["0", "1", "4095"] {
            let cheap = message(b'R', format!("\0\0\0\x0br=a,s=AAAA,i={iterations}").as_bytes());
            let (failure, heard) = against(vec![sasl(SCRAM_SHA_256), cheap]).await;
            let NoSession::Unverifiable(why) = failure else { panic!("{failure:?}") };
            assert!(why.contains(&format!("{iterations} iterations")), "{why}");
            assert!(!String::from_utf8_lossy(&heard).contains(",p="), "a proof was sent");
        }
        assert_eq!(is_costly(b"r=a,s=AAAA,i=4096"), Ok(()));
    }

    #[test]
    fn what_a_server_writes_can_neither_break_a_line_nor_turn_it() {
        let foul = "a\u{1b}[2Jb\r\nc\u{85}d\u{202e}e\u{2066}f\u{200b}g\u{2028}h\u{feff}i\u{61c}é";
        let harmless = |text: &str| {
            let bad =
                |c: char| c.is_control() || "\u{202e}\u{2066}\u{200b}\u{2028}\u{feff}\u{61c}".contains(c);
            assert!(!text.contains(bad), "{text:?}");
        };
        harmless(&legible(foul));
        assert!(legible(foul).ends_with('é'));
        assert_eq!(legible(&"x".repeat(100_000)).len(), 2 * LONGEST_MESSAGE);
        harmless(&unproven(foul).to_string());
        let mut body = BytesMut::from(message(b'E', format!("C28P01\0M{foul}\0\0").as_bytes()).as_slice());
        let Ok(Some(Message::ErrorResponse(body))) = Message::parse(&mut body) else { panic!("an error") };
        harmless(&ServerError::read(&body).to_string());
    }

    #[tokio::test]
    async fn who_skips_the_signature_is_not_believed() {
        let ok = message(b'R', &[0, 0, 0, 0]);
        let (failure, heard) = against(vec![sasl(SCRAM_SHA_256), ok]).await;
        assert!(matches!(failure, NoSession::Unverifiable(_)), "{failure:?}");
        assert!(!String::from_utf8_lossy(&heard).contains("canary"));
        let foreign = message(b'R', b"\0\0\0\x0br=foreign,s=AAAA,i=4096");
        let (failure, _) = against(vec![sasl(SCRAM_SHA_256), foreign]).await;
        assert!(matches!(failure, NoSession::Unverifiable(_)), "{failure:?}");
    }

    #[tokio::test]
    async fn nonsense_is_no_answer() {
        for nonsense in
            [b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), message(b'R', &[0]), vec![b'R', 0, 0, 0, 0]]
        {
            let (failure, _) = against(vec![nonsense]).await;
            assert!(matches!(failure, NoSession::Unavailable(_)), "{failure:?}");
        }
    }

    #[test]
    fn what_follows_the_signature_is_told_apart() {
        let error = |code: &str| ServerError { code: code.to_owned(), message: "no".to_owned() };
        assert!(matches!(admitted(error("3D000")), NoSession::Admitted(_)));
        assert!(matches!(admitted(error("42501")), NoSession::Admitted(_)));
        assert!(matches!(admitted(error("28000")), NoSession::Rejected(_)));
        for code in ["53300", "57P03", "55000", "XX000", "58030"] {
            assert!(matches!(admitted(error(code)), NoSession::Unavailable(_)), "{code}");
        }
    }

    #[test]
    fn a_message_that_quotes_a_verifier_is_not_shown() {
        let mut body = BytesMut::from(
            message(b'E', b"C42601\0Msyntax error at or near \"SCRAM-SHA-256$4096:abc\"\0\0").as_slice(),
        );
        let Ok(Some(Message::ErrorResponse(body))) = Message::parse(&mut body) else { panic!("an error") };
        let error = ServerError::read(&body);
        assert_eq!(error.code, "42601");
        assert!(!error.message.contains("4096"), "{error}");
    }
}
