//! A session with a server: our own small client, because of what it has to know about a login.
//!
//! ```text
//! TCP ─▶ SSLRequest ─▶ S: TLS ─▶ startup ─▶ SASL SCRAM-SHA-256 ─▶ proof ─▶ the server's own signature ─▶ ready
//!                      N: end              else: unverifiable,             else: unverifiable
//!                                          and nothing is sent
//! ```
//!
//! A login proves that a password is right only where the server demanded SCRAM-SHA-256 and then showed, by the
//! signature in its last message, that it knows the password's verifier (RFC 5802, section 3). Anything else (`trust`,
//! `password`, `md5`, `peer`, GSSAPI) would let in, or be shown, what proves nothing. Neither a password nor anything
//! that it could be read from is ever sent.
//!
//! What is written here was learnt from the PostgreSQL documentation, chapter "Frontend/Backend Protocol".

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::BytesMut;
use fallible_iterator::FallibleIterator as _;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
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
                b'M' => error.message = text().chars().map(visible).take(200).collect(),
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

fn visible(character: char) -> char {
    if character.is_control() { ' ' } else { character }
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
                let wire = secured(stream, door).await?;
                let mut session = Self { wire, incoming: BytesMut::new(), address };
                session.log_in(door.database, credential).await?;
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

    async fn log_in(&mut self, database: &str, credential: &Credential) -> Result<(), NoSession> {
        let parameters = [
            ("user", credential.username.as_str()),
            ("database", database),
            ("client_encoding", "UTF8"),
            ("application_name", APPLICATION),
        ];
        let mut startup = BytesMut::new();
        frontend::startup_message(parameters, &mut startup).map_err(|error| lost(&error))?;
        self.send(&startup).await.map_err(|error| lost(&error))?;
        self.challenged().await?;
        self.prove(credential).await?;
        self.settled().await
    }

    /// The server's demand. Until here it was told a name, and nothing else.
    async fn challenged(&mut self) -> Result<(), NoSession> {
        let method = match self.next_of_login(false).await? {
            Message::AuthenticationSasl(body) if offers_scram(&body) => return Ok(()),
            Message::AuthenticationSasl(_) => "wants a SASL mechanism other than SCRAM-SHA-256",
            Message::AuthenticationOk => "lets in without asking for a password (trust, peer or cert)",
            Message::AuthenticationCleartextPassword => {
                "wants the password itself (password, ldap, pam or radius)"
            }
            Message::AuthenticationMd5Password(_) => "wants an MD5 hash of the password",
            _ => "wants another proof than a password",
        };
        Err(NoSession::Unverifiable(format!("it {method}, and was sent none")))
    }

    /// Both sides prove that they know the password.
    async fn prove(&mut self, credential: &Credential) -> Result<(), NoSession> {
        // Not bound to the TLS channel: the certificate was verified, and a pooler may end it.
        let mut scram = ScramSha256::new(credential.password.as_bytes(), ChannelBinding::unsupported());
        let mut first = BytesMut::new();
        frontend::sasl_initial_response(SCRAM_SHA_256, scram.message(), &mut first)
            .map_err(|error| lost(&error))?;
        self.send(&first).await.map_err(|error| lost(&error))?;
        match self.next_of_login(false).await? {
            Message::AuthenticationSaslContinue(body) => {
                scram.update(body.data()).map_err(|error| unproven(&error.to_string()))?;
            }
            _ => return Err(unproven("it left the exchange")),
        }
        let mut second = BytesMut::new();
        frontend::sasl_response(scram.message(), &mut second).map_err(|error| lost(&error))?;
        self.send(&second).await.map_err(|error| lost(&error))?;
        match self.next_of_login(true).await? {
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

    /// The next message but for notices. An error of class 28 is about the password only where a proof was sent before:
    /// else it is about `pg_hba.conf`, or the exchange.
    async fn next_of_login(&mut self, proof_sent: bool) -> Result<Message, NoSession> {
        loop {
            match self.receive().await.map_err(|error| lost(&error))? {
                Message::ErrorResponse(body) => {
                    let error = ServerError::read(&body);
                    return Err(match proof_sent && error.denies() {
                        true => NoSession::Rejected(error.to_string()),
                        false => NoSession::Unavailable(error.to_string()),
                    });
                }
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

async fn secured(mut stream: TcpStream, door: &Door<'_>) -> Result<Box<dyn Wire>, NoSession> {
    let Encryption::VerifyFull { ca_file } = door.encryption else { return Ok(Box::new(stream)) };
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    stream.write_all(&request).await.map_err(|error| lost(&error))?;
    // One byte and no more: whatever came before TLS must not be taken for something said within.
    match stream.read_u8().await.map_err(|error| lost(&error))? {
        b'S' => {}
        b'N' => {
            return Err(NoSession::Unavailable("it takes no TLS, and nothing was sent without".to_owned()));
        }
        _ => return Err(NoSession::Unavailable("what answers there is no PostgreSQL server".to_owned())),
    }
    let secured = tls::secure(stream, &door.place.host, ca_file.as_deref()).await;
    Ok(Box::new(secured.map_err(NoSession::Unavailable)?))
}

fn offers_scram(body: &AuthenticationSaslBody) -> bool {
    body.mechanisms().any(|mechanism| Ok(mechanism == SCRAM_SHA_256)).unwrap_or(false)
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

fn unproven(problem: &str) -> NoSession {
    NoSession::Unverifiable(format!("it did not prove that it knows the password: {problem}"))
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
    use postgres_protocol::authentication::sasl::SCRAM_SHA_256_PLUS;
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
            assert!(matches!(failure, NoSession::Unavailable(_)), "{code}: {failure:?}");
        }
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
