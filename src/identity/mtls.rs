//! Callers that present a certificate in the TLS handshake.
//!
//! Trust is the listener's business: what comes here was verified against its certificate authorities, and is dropped
//! with its connection once it no longer is. Here a certificate's names become a principal.
//!
//! ```text
//! SPIFFE ID there? ── yes ─▶ it alone counts
//!      │ no
//! DNS names there? ── yes ─▶ they alone count       listed ─▶ kind, id and groups of its table
//!      │ no                                         not listed ─▶ Workload, its name as the id, in no group
//! common name there, and switched on? ─▶ it counts
//!      │ no
//!   refused
//! ```
//!
//! INVARIANT: the strongest kind of name that a certificate has decides. One that breaks its rules refuses the
//! certificate; it never makes room for a weaker one. Names are compared whole, never by a wildcard.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use data_encoding::HEXLOWER;
use jiff::Timestamp;
use ring::digest;
use serde::Deserialize;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;
use x509_parser::time::ASN1Time;

use super::{Authenticator, IdentityError, Presented, Principal, PrincipalKind, Proof, is_word};

/// `[identity.mtls]`: whom a certificate's name stands for.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The SPIFFE trust domain (`example.org`). With it, SPIFFE IDs of any other are refused.
    pub trust_domain: Option<String>,
    /// Whether the subject's common name counts where a certificate has neither a SPIFFE ID nor a DNS name. Default no:
    /// many authorities let a requester choose it freely.
    #[serde(default)]
    pub common_name: bool,
    /// One `[[identity.mtls.callers]]` table for each name.
    #[serde(default)]
    pub callers: Vec<Caller>,
}

/// Whom one name stands for. Exactly one of `spiffe`, `dns` and `common_name` is set.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Caller {
    /// A SPIFFE ID: `spiffe://example.org/orders`.
    pub spiffe: Option<String>,
    /// A DNS name, in lower case.
    pub dns: Option<String>,
    /// A common name; only with `identity.mtls.common_name = true`.
    pub common_name: Option<String>,
    /// `user` or `workload`.
    pub kind: PrincipalKind,
    /// The principal's id, as policies name it.
    pub id: String,
    /// The principal's groups.
    #[serde(default)]
    pub groups: BTreeSet<String>,
}

/// What a client's certificate says. One for each connection.
#[derive(Debug, Clone)]
pub struct ClientCertificate {
    /// The URI name of scheme `spiffe`, as written.
    pub spiffe: Option<String>,
    /// The DNS names, in lower case.
    pub dns: Vec<String>,
    /// The subject's common name, where there is exactly one.
    pub common_name: Option<String>,
    /// The serial number, in hexadecimal.
    pub serial: String,
    /// SHA-256 over the certificate, in hexadecimal.
    pub fingerprint: String,
    /// The last second at which it is valid.
    pub not_after: Timestamp,
    /// Why its SPIFFE ID can't be used.
    problem: Option<&'static str>,
    /// Whom it stands for: found out with the connection's first call, because a broker has one [`Mtls`] for life.
    recognised: OnceLock<Result<Arc<Principal>, IdentityError>>,
}

impl ClientCertificate {
    /// Reads the certificate that a client presented (DER). Whether it is trusted is not asked.
    ///
    /// # Errors
    /// [`IdentityError::Invalid`] where it, or its alternative names, can't be read.
    pub fn parse(der: &[u8]) -> Result<Self, IdentityError> {
        let (_, certificate) = parse_x509_certificate(der)
            .map_err(|_| invalid("it can't be read as X.509; have it issued anew"))?;
        let (uris, dns) = alternative_names(&certificate)?;
        let spiffe = uris.iter().copied().find(|uri| is_spiffe(uri));
        let problem = spiffe.and_then(|id| spiffe_problem(id, uris.len(), &certificate));
        Ok(Self {
            spiffe: spiffe.map(str::to_owned),
            dns,
            common_name: common_name(&certificate),
            serial: HEXLOWER.encode(certificate.raw_serial()),
            fingerprint: HEXLOWER.encode(digest::digest(&digest::SHA256, der).as_ref()),
            not_after: instant(certificate.validity().not_after),
            problem,
            recognised: OnceLock::new(),
        })
    }

    /// The first 64 bits of the fingerprint: enough to find the certificate by.
    fn short_fingerprint(&self) -> &str {
        self.fingerprint.get(..16).unwrap_or(&self.fingerprint)
    }
}

/// A certificate's time. RFC 5280 (section 4.1.2.5) writes "never" as the last second of the year 9999, which is past
/// what a timestamp holds.
pub(crate) fn instant(time: ASN1Time) -> Timestamp {
    let never = if time.timestamp() < 0 { Timestamp::MIN } else { Timestamp::MAX };
    Timestamp::from_second(time.timestamp()).unwrap_or(never)
}

/// The URI and the DNS names of the subject.
fn alternative_names<'a>(
    certificate: &'a X509Certificate<'_>,
) -> Result<(Vec<&'a str>, Vec<String>), IdentityError> {
    let unreadable = "its alternative names can't be read; have it issued anew";
    let names = certificate.subject_alternative_name().map_err(|_| invalid(unreadable))?;
    let (mut uris, mut dns) = (Vec::new(), Vec::new());
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            GeneralName::DNSName(name) => dns.push(name.to_ascii_lowercase()),
            GeneralName::Invalid(..) => return Err(invalid(unreadable)),
            _ => {}
        }
    }
    Ok((uris, dns))
}

fn common_name(certificate: &X509Certificate<'_>) -> Option<String> {
    let mut names = certificate.subject().iter_common_name();
    let first = names.next()?.as_str().ok()?.to_owned();
    names.next().is_none().then_some(first)
}

fn is_spiffe(uri: &str) -> bool {
    uri.split_once(':').is_some_and(|(scheme, _)| scheme.eq_ignore_ascii_case("spiffe"))
}

/// The rules for the certificate of a SPIFFE workload (X509-SVID, sections 2 and 5.2).
fn spiffe_problem(id: &str, uris: usize, certificate: &X509Certificate<'_>) -> Option<&'static str> {
    let signs = match certificate.key_usage() {
        Ok(usage) => usage.is_some_and(|usage| usage.value.key_cert_sign() || usage.value.crl_sign()),
        Err(_) => true,
    };
    if uris != 1 {
        Some("it has a SPIFFE ID and another URI name; have it issued with one URI name alone")
    } else if signs || certificate.is_ca() {
        Some("it has a SPIFFE ID and may sign certificates; present a leaf certificate")
    } else if !is_spiffe_id(id) {
        Some("its SPIFFE ID is not spiffe://trust-domain/path; have it issued anew")
    } else {
        None
    }
}

/// Whether text is a SPIFFE ID of a workload: `spiffe://`, a trust domain, a path (SPIFFE-ID, section 2). Neither a
/// port, a query, a fragment nor an escape can stand in one.
fn is_spiffe_id(text: &str) -> bool {
    let parts = text.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/'));
    parts.is_some_and(|(domain, path)| {
        text.len() <= 2_048 && is_trust_domain(domain) && path.split('/').all(is_path_segment)
    })
}

fn is_trust_domain(text: &str) -> bool {
    let permitted = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_');
    (1..=255).contains(&text.len()) && text.chars().all(permitted)
}

fn is_path_segment(text: &str) -> bool {
    let permitted = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !matches!(text, "" | "." | "..") && text.chars().all(permitted)
}

/// Whether text is one whole DNS name in lower case: no wildcard, no final dot.
fn is_dns_name(text: &str) -> bool {
    let permitted = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.chars().all(permitted)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(is_label)
}

/// A name that a certificate can be known by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Name {
    Spiffe(String),
    Dns(String),
    Common(String),
}

impl Name {
    /// The id of a principal that no table names.
    fn id(&self) -> String {
        match self {
            Self::Spiffe(id) => id.clone(),
            Self::Dns(name) => format!("dns:{name}"),
            Self::Common(name) => format!("cn:{name}"),
        }
    }
}

/// Whom a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    kind: PrincipalKind,
    id: String,
    groups: BTreeSet<String>,
}

/// Recognises callers by their certificates.
#[derive(Debug)]
pub struct Mtls {
    trust_domain: Option<String>,
    common_name: bool,
    callers: HashMap<Name, Known>,
}

impl Mtls {
    /// Refuses what could never match, and two tables for one name: the second would silently win.
    ///
    /// # Errors
    /// A line that names the key and the mend.
    pub fn new(config: Config) -> Result<Self, String> {
        if let Some(domain) = &config.trust_domain
            && !is_trust_domain(domain)
        {
            return Err(format!(
                "identity.mtls.trust_domain: `{}` is not a trust domain; write it as in `example.org`: lower-case \
                 letters, digits, `.`, `-` and `_`, without `spiffe://`",
                domain.escape_default()
            ));
        }
        let mut mtls = Self {
            trust_domain: config.trust_domain,
            common_name: config.common_name,
            callers: HashMap::new(),
        };
        for caller in config.callers {
            mtls.list(caller)?;
        }
        Ok(mtls)
    }

    fn list(&mut self, caller: Caller) -> Result<(), String> {
        let Caller { spiffe, dns, common_name, kind, id, groups } = caller;
        let refuse = |problem: &str| {
            Err(format!("identity.mtls.callers: the caller of id `{}`: {problem}", id.escape_default()))
        };
        if !is_word(&id) || !groups.iter().all(|group| is_word(group)) {
            return refuse("id and groups must be 1 to 128 printable ASCII characters without spaces");
        }
        let name = match (spiffe, dns, common_name) {
            (Some(id), None, None) => Name::Spiffe(id),
            (None, Some(name), None) => Name::Dns(name),
            (None, None, Some(name)) => Name::Common(name),
            _ => return refuse("set exactly one of `spiffe`, `dns` and `common_name`"),
        };
        if let Some(problem) = self.never_matches(&name) {
            return refuse(problem);
        }
        if self.callers.contains_key(&name) {
            return refuse("the same name stands twice; keep one table");
        }
        self.callers.insert(name, Known { kind, id, groups });
        Ok(())
    }

    fn never_matches(&self, name: &Name) -> Option<&'static str> {
        match name {
            Name::Spiffe(id) if !is_spiffe_id(id) => Some("`spiffe` must be spiffe://trust-domain/path"),
            Name::Spiffe(id) if !self.trusts_domain_of(id) => {
                Some("`spiffe` is outside of identity.mtls.trust_domain; correct one of the two")
            }
            Name::Dns(name) if !is_dns_name(name) => {
                Some("`dns` must be one whole DNS name in lower case, without a wildcard")
            }
            Name::Common(_) if !self.common_name => {
                Some("`common_name` counts only with identity.mtls.common_name = true")
            }
            Name::Common(name) if !is_word(name) => {
                Some("`common_name` must be 1 to 128 printable ASCII characters without spaces")
            }
            _ => None,
        }
    }

    fn trusts_domain_of(&self, id: &str) -> bool {
        let domain = id.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/')).map(|parts| parts.0);
        self.trust_domain.is_none() || domain == self.trust_domain.as_deref()
    }

    fn recognise(&self, certificate: &ClientCertificate) -> Result<Principal, IdentityError> {
        let names = self.names(certificate)?;
        let mut listed = names.iter().filter_map(|name| self.callers.get(name));
        let known = match listed.next() {
            Some(known) if listed.all(|other| other == known) => known.clone(),
            Some(_) => {
                return Err(invalid(
                    "its names are listed for several callers; list one, or have it reissued",
                ));
            }
            None => stranger(&names)?,
        };
        let detail = format!("sha256={}", certificate.short_fingerprint());
        let proof = Proof { method: "mtls", detail };
        Ok(Principal::new(known.kind, known.id, known.groups, BTreeMap::new(), proof))
    }

    /// The names of the strongest kind that the certificate has; at least one.
    fn names(&self, certificate: &ClientCertificate) -> Result<Vec<Name>, IdentityError> {
        if let Some(problem) = certificate.problem {
            return Err(invalid(problem));
        }
        if let Some(id) = &certificate.spiffe {
            return match self.trusts_domain_of(id) {
                true => Ok(vec![Name::Spiffe(id.clone())]),
                false => Err(invalid("its SPIFFE ID is of another trust domain than this broker's")),
            };
        }
        if !certificate.dns.is_empty() {
            return match certificate.dns.iter().all(|name| is_dns_name(name)) {
                true => Ok(certificate.dns.iter().cloned().map(Name::Dns).collect()),
                false => {
                    Err(invalid("a DNS name in it is a wildcard or no name; have it issued for one name"))
                }
            };
        }
        match &certificate.common_name {
            Some(name) if self.common_name && is_word(name) => Ok(vec![Name::Common(name.clone())]),
            Some(_) if self.common_name => {
                Err(invalid("its common name is not 1 to 128 printable ASCII characters without spaces"))
            }
            _ => Err(invalid("it has neither a SPIFFE ID nor a DNS name; have it issued with one")),
        }
    }
}

/// Someone whom no table names: in no group, so that policy denies them and the audit log says who it was.
fn stranger(names: &[Name]) -> Result<Known, IdentityError> {
    let id = names.first().map(Name::id).filter(|id| is_word(id));
    let id =
        id.ok_or_else(|| invalid("its name is longer than an id may be; list it, or have it reissued"))?;
    Ok(Known { kind: PrincipalKind::Workload, id, groups: BTreeSet::new() })
}

fn invalid(problem: &'static str) -> IdentityError {
    IdentityError::Invalid { method: "client certificate", problem }
}

#[async_trait]
impl Authenticator for Mtls {
    async fn authenticate(&self, presented: &Presented) -> Result<Option<Arc<Principal>>, IdentityError> {
        let Some(certificate) = &presented.certificate else { return Ok(None) };
        let recognised = certificate.recognised.get_or_init(|| self.recognise(certificate).map(Arc::new));
        recognised.clone().map(Some)
    }

    fn concerns(&self, presented: &Presented) -> bool {
        presented.certificate.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType};

    fn params(uris: &[&str], dns: &[&str], common_name: Option<&str>) -> CertificateParams {
        let mut params = CertificateParams::default();
        let uris = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap()));
        let dns = dns.iter().map(|name| SanType::DnsName((*name).try_into().unwrap()));
        params.subject_alt_names = uris.chain(dns).collect();
        params.distinguished_name = DistinguishedName::new();
        if let Some(name) = common_name {
            params.distinguished_name.push(DnType::CommonName, name);
        }
        params
    }

    fn issued(params: &CertificateParams) -> ClientCertificate {
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        ClientCertificate::parse(certificate.der()).unwrap()
    }

    fn caller(spiffe: Option<&str>, dns: Option<&str>, common_name: Option<&str>, id: &str) -> Caller {
        Caller {
            spiffe: spiffe.map(str::to_owned),
            dns: dns.map(str::to_owned),
            common_name: common_name.map(str::to_owned),
            kind: PrincipalKind::Workload,
            id: id.to_owned(),
            groups: BTreeSet::from(["services".to_owned()]),
        }
    }

    async fn known(mtls: &Mtls, certificate: ClientCertificate) -> Result<Arc<Principal>, IdentityError> {
        let presented = Presented { certificate: Some(Arc::new(certificate)), ..Presented::default() };
        let first = mtls.authenticate(&presented).await.map(|principal| principal.unwrap());
        assert_eq!(first, mtls.authenticate(&presented).await.map(|principal| principal.unwrap()));
        first
    }

    fn sample() -> Mtls {
        let config = Config {
            trust_domain: Some("example.org".to_owned()),
            common_name: false,
            callers: vec![
                caller(Some("spiffe://example.org/ns/shop/orders"), None, None, "orders"),
                caller(None, Some("billing.internal"), None, "billing"),
                caller(None, Some("ledger.internal"), None, "ledger"),
                caller(None, Some("billing.shop.internal"), None, "billing"),
            ],
        };
        Mtls::new(config).unwrap()
    }

    #[tokio::test]
    async fn the_strongest_name_decides() {
        let mtls = sample();
        let orders = params(&["spiffe://example.org/ns/shop/orders"], &["billing.internal"], Some("x"));
        let orders = known(&mtls, issued(&orders)).await.unwrap();
        assert_eq!((orders.id(), orders.groups().len(), orders.proof().method), ("orders", 1, "mtls"));
        assert!(orders.proof().detail.starts_with("sha256="), "{:?}", orders.proof());
        assert_eq!(orders.proof().detail.len(), "sha256=".len() + 16);

        let unlisted = params(&["spiffe://example.org/other"], &["billing.internal"], None);
        let unlisted = known(&mtls, issued(&unlisted)).await.unwrap();
        assert_eq!((unlisted.id(), unlisted.groups().len()), ("spiffe://example.org/other", 0));
        assert_eq!(unlisted.kind(), PrincipalKind::Workload);

        let billing = params(&[], &["Billing.Internal", "unlisted.internal"], None);
        assert_eq!(known(&mtls, issued(&billing)).await.unwrap().id(), "billing");
        let both = params(&[], &["billing.internal", "billing.shop.internal"], None);
        assert_eq!(known(&mtls, issued(&both)).await.unwrap().id(), "billing", "two names for one caller");
        let unlisted = params(&["https://example.org/"], &["a.internal", "b.internal"], None);
        assert_eq!(known(&mtls, issued(&unlisted)).await.unwrap().id(), "dns:a.internal");
        assert!(mtls.authenticate(&Presented::default()).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn names_that_break_their_rules_refuse_the_certificate() {
        let mtls = sample();
        let long = format!("spiffe://example.org/{}", "a".repeat(128));
        let mut signer = params(&["spiffe://example.org/ns/shop/orders"], &[], None);
        signer.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign];
        let mut authority = params(&["spiffe://example.org/ns/shop/orders"], &[], None);
        authority.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        for (refused, word) in [
            (params(&["spiffe://example.com/orders"], &["billing.internal"], None), "trust domain"),
            (params(&["spiffe://example.org/a", "https://x/"], &[], None), "another URI"),
            (params(&["spiffe://example.org/a", "spiffe://example.org/b"], &[], None), "another URI"),
            (params(&["spiffe://example.org"], &["billing.internal"], None), "spiffe://trust-domain/path"),
            (params(&["SPIFFE://example.org/a"], &["billing.internal"], None), "spiffe://trust-domain/path"),
            (params(&[long.as_str()], &[], None), "longer"),
            (params(&[], &["*.internal"], None), "wildcard"),
            (params(&[], &["billing.internal", "*.internal"], None), "wildcard"),
            (params(&[], &["billing.internal", "ledger.internal"], None), "several callers"),
            (params(&[], &[], Some("orders")), "neither"),
            (params(&[], &[], None), "neither"),
            (signer, "leaf"),
            (authority, "leaf"),
        ] {
            let error = known(&mtls, issued(&refused)).await.unwrap_err();
            assert!(matches!(error, IdentityError::Invalid { .. }), "{error:?}");
            assert!(error.to_string().contains(word), "{error} should say {word}");
        }
        assert!(ClientCertificate::parse(b"rubbish").is_err());
    }

    #[tokio::test]
    async fn common_names_count_only_where_switched_on() {
        let callers = vec![caller(None, None, Some("legacy"), "old-app")];
        let off = Config { callers: callers.clone(), ..Config::default() };
        assert!(Mtls::new(off).unwrap_err().contains("common_name = true"));
        let on = Mtls::new(Config { common_name: true, callers, trust_domain: None }).unwrap();
        assert_eq!(known(&on, issued(&params(&[], &[], Some("legacy")))).await.unwrap().id(), "old-app");
        assert_eq!(known(&on, issued(&params(&[], &[], Some("other")))).await.unwrap().id(), "cn:other");
        let beside = known(&on, issued(&params(&[], &["a.internal"], Some("legacy")))).await.unwrap();
        assert_eq!(beside.id(), "dns:a.internal", "a DNS name is stronger");
        for bad in ["", "Ana B", "é"] {
            assert!(known(&on, issued(&params(&[], &[], Some(bad)))).await.is_err(), "{bad:?}");
        }
    }

    #[test]
    fn tables_that_could_never_match_are_refused() {
        for bad in [
            caller(None, None, None, "x"),
            caller(Some("spiffe://example.org/a"), Some("a.internal"), None, "x"),
            caller(Some("spiffe://example.com/a"), None, None, "x"),
            caller(Some("spiffe://example.org/a/"), None, None, "x"),
            caller(None, Some("*.internal"), None, "x"),
            caller(None, Some("A.internal"), None, "x"),
            caller(None, Some("a.internal"), None, "no good"),
        ] {
            let config = Config { callers: vec![bad.clone()], ..domain("example.org") };
            assert!(Mtls::new(config).is_err(), "{bad:?}");
        }
        let twice = vec![caller(None, Some("a"), None, "x"), caller(None, Some("a"), None, "y")];
        assert!(Mtls::new(Config { callers: twice, ..Config::default() }).unwrap_err().contains("twice"));
        for bad in ["", "Example.org", "spiffe://example.org", "a/b", "a:1"] {
            assert!(Mtls::new(domain(bad)).is_err(), "{bad:?}");
        }
    }

    fn domain(name: &str) -> Config {
        Config { trust_domain: Some(name.to_owned()), ..Config::default() }
    }

    #[test]
    fn spiffe_ids_follow_their_grammar() {
        for good in ["spiffe://example.org/a", "spiffe://a_b.c-d/x.y/Z-_/..."] {
            assert!(is_spiffe_id(good), "{good}");
        }
        for bad in [
            "",
            "spiffe://",
            "spiffe://example.org",
            "spiffe://example.org/",
            "spiffe:///a",
            "spiffe://Example.org/a",
            "spiffe://user@example.org/a",
            "spiffe://example.org:443/a",
            "spiffe://example.org/a?b",
            "spiffe://example.org/a#b",
            "spiffe://example.org/a%20b",
            "spiffe://example.org/a//b",
            "spiffe://example.org/./b",
            "spiffe://example.org/../b",
            "spiffe://example.org/é",
            "https://example.org/a",
        ] {
            assert!(!is_spiffe_id(bad), "{bad}");
        }
    }

    #[test]
    fn a_certificate_without_end_has_one_that_can_be_told() {
        let never = ASN1Time::from_timestamp(253_402_300_799).unwrap();
        assert_eq!(instant(never), Timestamp::MAX);
        assert_eq!(instant(ASN1Time::from_timestamp(0).unwrap()), Timestamp::UNIX_EPOCH);
    }
}
