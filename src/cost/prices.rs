//! The price book: what a gigabyte costs on its way from one place to another.
//!
//! The shipped book (`config/pricing.yaml`) holds dated public list prices with their sources. It is read once, on
//! first use, on whatever thread asks first; nothing on the path of a request may be that thread. Amounts become
//! integers (nano-dollars per GB of the provider's own GB) without passing through a float.
//!
//! A rate here is the marginal one of the first paid band: what one more gigabyte costs a small account.

use std::{collections::BTreeMap, num::NonZeroU64, sync::LazyLock};

use saphyr_parser::ScanError;

use crate::{
    cost::{continent::Continent, node::Node},
    model::{ByteCount, NanoUsd, NetworkMode, Place, Zone},
};

/// Why a price book was refused.
#[derive(Debug, thiserror::Error)]
pub enum PriceError {
    /// It is no YAML.
    #[error("the price book is no YAML")]
    Syntax(#[source] ScanError),
    /// Something that must be there is not.
    #[error("the price book has no {what}")]
    Missing {
        /// What is not there.
        what: String,
    },
    /// An amount that is no decimal number of dollars with at most nine decimals.
    #[error("the price book says {found:?} where an amount belongs")]
    Amount {
        /// What is there.
        found: String,
    },
}

/// Where traffic begins or ends.
#[derive(Clone, Copy, Debug)]
pub struct Site<'a> {
    /// Provider and region.
    pub place: &'a Place,
    /// Availability zone, where it is known. An unknown one counts as another zone.
    pub zone: Option<&'a Zone>,
}

/// What a path is to the provider who bills it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PriceClass {
    /// Within one zone.
    SameZone,
    /// Between zones of a region, over inner addresses.
    InterZone,
    /// Within a region, over public addresses.
    SameRegion,
    /// Between regions of a provider.
    InterRegion,
    /// To another cloud over the internet.
    OtherCloud,
    /// To another cloud through a VPN.
    Vpn,
    /// To another cloud over an interconnect that the two providers offer for this pair of regions.
    Interconnect,
    /// To another cloud over the provider's own direct line (Direct Connect, ExpressRoute, Interconnect).
    DirectLine,
    /// To a host outside the project.
    Internet,
}

impl PriceClass {
    /// The class as the price book and reports write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SameZone => "same_zone",
            Self::InterZone => "inter_zone",
            Self::SameRegion => "same_region",
            Self::InterRegion => "inter_region",
            Self::OtherCloud => "other_cloud",
            Self::Vpn => "vpn",
            Self::Interconnect => "interconnect",
            Self::DirectLine => "direct_line",
            Self::Internet => "internet",
        }
    }

    /// The book's keys for this class, the first that a provider has counts. Another cloud is reached over the
    /// internet, so a provider that lists no price of its own for that takes its internet price.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::SameZone => &["same_zone"],
            Self::InterZone => &["inter_zone"],
            Self::SameRegion => &["same_region"],
            Self::InterRegion => &["inter_region"],
            Self::OtherCloud => &["other_cloud", "internet"],
            Self::Vpn => &["vpn", "internet"],
            Self::Interconnect => &[],
            Self::DirectLine => &["direct_connect_out", "expressroute_out", "interconnect_out"],
            Self::Internet => &["internet"],
        }
    }
}

/// A price: nano-dollars for one GB, of as many bytes as the provider's GB has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// What one GB costs.
    pub per_gb: NanoUsd,
    /// How many bytes the provider bills as one GB.
    pub bytes_per_gb: NonZeroU64,
}

impl Rate {
    /// What so many bytes cost, rounded once, half to even. Saturates beyond nine billion dollars.
    #[must_use]
    pub fn cost(self, bytes: ByteCount) -> NanoUsd {
        let product = i128::from(bytes.0) * i128::from(self.per_gb.0);
        NanoUsd(divide_half_even(product, i128::from(self.bytes_per_gb.get())))
    }
}

/// `dividend / divisor` to the nearest integer, ties to the even one. `divisor` is positive.
fn divide_half_even(dividend: i128, divisor: i128) -> i64 {
    let (quotient, remainder) = (dividend.div_euclid(divisor), dividend.rem_euclid(divisor));
    let up = match (remainder * 2).cmp(&divisor) {
        std::cmp::Ordering::Less => 0,
        std::cmp::Ordering::Equal => quotient.rem_euclid(2),
        std::cmp::Ordering::Greater => 1,
    };
    let rounded = quotient + up;
    i64::try_from(rounded).unwrap_or(if rounded < 0 { i64::MIN } else { i64::MAX })
}

/// Prices for network transfer, by provider, region and class.
#[derive(Debug)]
pub struct PriceBook {
    as_of: String,
    providers: BTreeMap<String, Tariff>,
    links: Vec<Link>,
}

/// One provider's prices.
#[derive(Debug)]
struct Tariff {
    bytes_per_gb: NonZeroU64,
    groups: Vec<Group>,
    common: Prices,
}

/// Regions that share prices.
#[derive(Debug)]
struct Group {
    regions: Vec<String>,
    prices: Prices,
}

impl Group {
    fn lists(&self, region: &str) -> bool {
        self.regions.iter().any(|listed| listed == region)
    }

    /// As [`Group::lists`], but `us-*` stands for all that begin with `us-`.
    fn covers(&self, region: &str) -> bool {
        let begins = |listed: &String| {
            listed.strip_suffix('*').is_some_and(|prefix| region.starts_with(prefix))
        };
        self.regions.iter().any(begins)
    }
}

type Prices = BTreeMap<String, Price>;

/// One entry of the book.
#[derive(Debug)]
enum Price {
    /// The same as another entry of the provider.
    Alias(String),
    /// An amount, and where it differs.
    Amount(Amount),
}

#[derive(Debug)]
struct Amount {
    first_band: NanoUsd,
    both_directions: bool,
    /// `from>to` → amount.
    pairs: BTreeMap<String, NanoUsd>,
    /// Sending region → amount.
    regions: BTreeMap<String, NanoUsd>,
    intercontinental: Option<NanoUsd>,
    /// `china`, `australia` → amount.
    destinations: BTreeMap<String, NanoUsd>,
}

impl Amount {
    fn towards(&self, from: &Place, to: Option<&Place>) -> NanoUsd {
        let amount = to.and_then(|to| self.exception(from, to)).unwrap_or_else(|| {
            self.regions.get(from.region().as_str()).copied().unwrap_or(self.first_band)
        });
        if self.both_directions { NanoUsd(amount.0.saturating_mul(2)) } else { amount }
    }

    fn exception(&self, from: &Place, to: &Place) -> Option<NanoUsd> {
        let pair = format!("{}>{}", from.region(), to.region());
        if let Some(amount) = self.pairs.get(&pair) {
            return Some(*amount);
        }
        let (here, there) = (Continent::of(from)?, Continent::of(to)?);
        let destination = match there {
            Continent::China => self.destinations.get("china"),
            Continent::Oceania => self.destinations.get("australia"),
            Continent::NorthAmerica
            | Continent::SouthAmerica
            | Continent::Europe
            | Continent::Asia
            | Continent::MiddleEast
            | Continent::Africa => None,
        };
        destination.copied().or(if here == there { None } else { self.intercontinental })
    }
}

/// An interconnect that two providers offer together; paid by the hour, so a gigabyte more costs `per_gb`.
#[derive(Debug)]
struct Link {
    providers: [String; 2],
    /// Regions of the first and the second provider.
    pairs: Vec<[String; 2]>,
    /// Regions of the second provider that are reached from any region of the first.
    second_regions: Vec<String>,
    per_gb: NanoUsd,
}

impl Link {
    fn joins(&self, from: &Place, to: &Place) -> bool {
        self.joins_in_order(from, to) || self.joins_in_order(to, from)
    }

    fn joins_in_order(&self, one: &Place, other: &Place) -> bool {
        let [first, second] = &self.providers;
        if first != one.provider().as_str() || second != other.provider().as_str() {
            return false;
        }
        let (one, other) = (one.region().as_str(), other.region().as_str());
        self.pairs.iter().any(|[a, b]| a == one && b == other)
            || self.second_regions.iter().any(|region| region == other)
    }
}

impl PriceBook {
    /// The book that ships with infrar. The first call reads it; keep that off the path of requests.
    #[must_use]
    pub fn shipped() -> &'static Self {
        #[expect(clippy::expect_used, reason = "the text is a constant that a test reads")]
        static BOOK: LazyLock<PriceBook> = LazyLock::new(|| {
            let text = include_str!("../../config/pricing.yaml");
            PriceBook::parse(text).expect("the shipped price book is read by a test")
        });
        &BOOK
    }

    /// Reads a book.
    ///
    /// # Errors
    /// [`PriceError`] when it cannot be read whole.
    pub fn parse(text: &str) -> Result<Self, PriceError> {
        let root = Node::parse(text).map_err(PriceError::Syntax)?;
        let mut providers = BTreeMap::new();
        for (name, tariff) in root.entries_of("providers") {
            providers.insert(name.to_owned(), read_tariff(name, tariff)?);
        }
        let links = root.items_of("multicloud_interconnects").map(read_link);
        Ok(Self {
            as_of: root.text_of("as_of").ok_or_else(|| missing("as_of"))?.to_owned(),
            providers,
            links: links.collect::<Result<_, _>>()?,
        })
    }

    /// The day the book was put together, as it is written there.
    #[must_use]
    pub fn as_of(&self) -> &str {
        &self.as_of
    }

    /// What the path is to the provider who bills it. `mode` says which address is used, also within one place
    /// (there `public` is the `url`).
    #[must_use]
    pub fn class(&self, from: Site<'_>, to: Site<'_>, mode: NetworkMode) -> PriceClass {
        if from.place == to.place {
            return if from.zone.is_some() && from.zone == to.zone {
                PriceClass::SameZone
            } else if mode == NetworkMode::Public {
                PriceClass::SameRegion
            } else {
                PriceClass::InterZone
            };
        }
        if from.place.provider() == to.place.provider() {
            return PriceClass::InterRegion;
        }
        match mode {
            NetworkMode::Public => PriceClass::OtherCloud,
            NetworkMode::Vpn => PriceClass::Vpn,
            NetworkMode::PrivatePeering if self.link(from.place, to.place).is_some() => {
                PriceClass::Interconnect
            }
            NetworkMode::PrivatePeering => PriceClass::DirectLine,
        }
    }

    /// What the provider of `from` bills for one more gigabyte; `to` is `None` for hosts outside the project. `None`
    /// when the book does not know.
    #[must_use]
    pub fn rate(&self, class: PriceClass, from: &Place, to: Option<&Place>) -> Option<Rate> {
        let tariff = self.providers.get(from.provider().as_str())?;
        let per_gb = if class == PriceClass::Interconnect {
            self.link(from, to?)?.per_gb
        } else {
            tariff.amount(class, from.region().as_str())?.towards(from, to)
        };
        Some(Rate { per_gb, bytes_per_gb: tariff.bytes_per_gb })
    }

    fn link(&self, from: &Place, to: &Place) -> Option<&Link> {
        self.links.iter().find(|link| link.joins(from, to))
    }
}

impl Tariff {
    fn amount(&self, class: PriceClass, region: &str) -> Option<&Amount> {
        class.keys().iter().find_map(|key| self.resolve(key, region))
    }

    fn resolve(&self, key: &str, region: &str) -> Option<&Amount> {
        let exact = self.groups.iter().find(|group| group.lists(region));
        let group = exact.or_else(|| self.groups.iter().find(|group| group.covers(region)));
        let entry = |key: &str| {
            group.and_then(|group| group.prices.get(key)).or_else(|| self.common.get(key))
        };
        match entry(key)? {
            Price::Amount(amount) => Some(amount),
            Price::Alias(other) => match entry(other)? {
                Price::Amount(amount) => Some(amount),
                Price::Alias(_) => None,
            },
        }
    }
}

fn read_tariff(name: &str, node: &Node<'_>) -> Result<Tariff, PriceError> {
    let gb = node.text_of("bytes_per_gb").and_then(|text| text.parse().ok());
    let mut groups = Vec::new();
    for (_, group) in node.entries_of("groups") {
        let regions = group.items_of("regions").filter_map(Node::text).map(str::to_owned).collect();
        groups.push(Group { regions, prices: read_prices(group.entries())? });
    }
    Ok(Tariff {
        bytes_per_gb: gb.ok_or_else(|| missing(&format!("bytes_per_gb of {name}")))?,
        groups,
        common: read_prices(node.entries_of("common"))?,
    })
}

/// Every entry that has bands or an alias; other keys (regions, free pools, notes) are no prices per GB.
fn read_prices<'a, 'b: 'a>(
    nodes: impl Iterator<Item = (&'a str, &'a Node<'b>)>,
) -> Result<Prices, PriceError> {
    let mut prices = Prices::new();
    for (key, node) in nodes {
        if let Some(other) = node.text_of("alias_of") {
            prices.insert(key.to_owned(), Price::Alias(other.to_owned()));
        } else if let Some(band) = node.items_of("tiers").next() {
            let amount = read_amount(band, node)?;
            prices.insert(key.to_owned(), Price::Amount(amount));
        }
    }
    Ok(prices)
}

fn read_amount(first_band: &Node<'_>, node: &Node<'_>) -> Result<Amount, PriceError> {
    let amounts = |key| {
        let each = node
            .entries_of(key)
            .filter_map(|(name, node)| Some((name.to_owned(), dollars(node.text()?))));
        each.map(|(name, amount)| Ok((name, amount?))).collect::<Result<_, PriceError>>()
    };
    let mut destinations = BTreeMap::new();
    for (name, bands) in node.entries_of("by_destination") {
        let first = bands.items().next().ok_or_else(|| missing("bands of a destination"))?;
        destinations.insert(name.to_owned(), band_amount(first)?);
    }
    Ok(Amount {
        first_band: band_amount(first_band)?,
        both_directions: node.text_of("charged") == Some("both_directions"),
        pairs: amounts("pairs")?,
        regions: amounts("regions_override")?,
        intercontinental: node.text_of("intercontinental_usd_per_gb").map(dollars).transpose()?,
        destinations,
    })
}

/// The price of a band `[up_to_gb, usd_per_gb]`.
fn band_amount(band: &Node<'_>) -> Result<NanoUsd, PriceError> {
    band.items()
        .nth(1)
        .and_then(Node::text)
        .ok_or_else(|| missing("price of a band"))
        .and_then(dollars)
}

fn read_link(node: &Node<'_>) -> Result<Link, PriceError> {
    let names = |node: &Node<'_>| -> Result<[String; 2], PriceError> {
        let names: Vec<_> = node.items().filter_map(Node::text).map(str::to_owned).collect();
        names.try_into().map_err(|_other: Vec<_>| missing("two sides of an interconnect"))
    };
    let between = node.field("between").ok_or_else(|| missing("between of an interconnect"))?;
    let providers = names(between)?;
    let [_, second] = &providers;
    let regions_key = format!("{second}_regions");
    let second_regions = node.items_of(&regions_key);
    let amount = node.text_of("usd_per_gb").ok_or_else(|| missing("price of an interconnect"))?;
    Ok(Link {
        pairs: node.items_of("pairs").map(names).collect::<Result<_, _>>()?,
        second_regions: second_regions.filter_map(Node::text).map(str::to_owned).collect(),
        per_gb: dollars(amount)?,
        providers,
    })
}

/// Reads a decimal number of dollars exactly: at most nine decimals, no exponent, not negative.
fn dollars(text: &str) -> Result<NanoUsd, PriceError> {
    let amount = || {
        let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        if !digits(whole) || !digits(decimals) || decimals.len() > 9 {
            return None;
        }
        let whole: i64 = whole.parse().ok()?;
        let nanos: i64 = format!("{decimals:0<9}").parse().ok()?;
        whole.checked_mul(1_000_000_000)?.checked_add(nanos)
    };
    amount().map(NanoUsd).ok_or_else(|| PriceError::Amount { found: text.to_owned() })
}

fn missing(what: &str) -> PriceError {
    PriceError::Missing { what: what.to_owned() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn place(text: &str) -> Place {
        text.parse().unwrap()
    }

    /// Nano-dollars per GB for a path between two places whose zones are unknown.
    fn per_gb(from: &str, to: &str, mode: NetworkMode) -> Option<i64> {
        let (from, to) = (place(from), place(to));
        let book = PriceBook::shipped();
        let site = |place| Site { place, zone: None };
        let class = book.class(site(&from), site(&to), mode);
        book.rate(class, &from, Some(&to)).map(|rate| rate.per_gb.0)
    }

    #[test]
    fn list_prices_come_out_of_the_shipped_book() {
        use NetworkMode::{PrivatePeering, Public, Vpn};
        for (from, to, mode, dollars_per_gb) in [
            ("aws_us_east_1", "azure_eastus", Public, "0.09"),
            ("azure_eastus", "aws_us_east_1", Public, "0.087"),
            ("gcp_us_central1", "azure_eastus", Public, "0.12"),
            ("gcp_us_central1", "aws_ap_southeast_2", Public, "0.19"),
            ("aws_us_east_1", "azure_eastus", Vpn, "0.09"),
            ("aws_us_east_1", "aws_us_east_2", Public, "0.01"),
            ("aws_us_east_1", "aws_eu_west_1", Vpn, "0.02"),
            ("aws_il_central_1", "aws_us_east_1", Public, "0.08"),
            ("azure_eastus", "azure_westus", Public, "0.02"),
            ("azure_eastus", "azure_westeurope", Public, "0.05"),
            // Both directions are charged to the same account.
            ("aws_us_east_1", "aws_us_east_1", Vpn, "0.02"),
            ("gcp_us_east1", "gcp_us_east1", Vpn, "0.01"),
            ("azure_eastus", "azure_eastus", Vpn, "0"),
            // A listed pair costs nothing per GB, in either direction; others take the provider's own line.
            ("aws_us_east_1", "gcp_us_east4", PrivatePeering, "0"),
            ("gcp_us_east4", "aws_us_east_1", PrivatePeering, "0"),
            ("azure_eastus", "aws_us_west_2", PrivatePeering, "0"),
            ("aws_us_east_1", "gcp_us_central1", PrivatePeering, "0.02"),
            ("azure_eastus", "gcp_us_central1", PrivatePeering, "0.025"),
            ("gcp_us_central1", "azure_eastus", PrivatePeering, "0.02"),
            // No price of its own for other clouds: they are the internet.
            ("hetzner_fsn1", "aws_us_east_1", Public, "0.0012"),
            ("oracle_us_ashburn_1", "aws_us_west_1", Public, "0.0085"),
        ] {
            let expected = dollars(dollars_per_gb).unwrap().0;
            assert_eq!(per_gb(from, to, mode), Some(expected), "{from} → {to} {mode}");
        }
    }

    #[test]
    fn what_the_book_does_not_know_has_no_price() {
        assert_eq!(per_gb("nobody_here", "aws_us_east_1", NetworkMode::Public), None);
        assert_eq!(per_gb("aws_moon_1", "azure_eastus", NetworkMode::Public), None);
        assert_eq!(per_gb("hetzner_fsn1", "hetzner_nbg1", NetworkMode::Vpn), None);
    }

    #[test]
    fn the_class_follows_zone_region_provider_and_mode() {
        let book = PriceBook::shipped();
        let (virginia, ohio) = (place("aws_us_east_1"), place("aws_us_east_2"));
        let (a, b): (Zone, Zone) = ("us-east-1a".parse().unwrap(), "us-east-1b".parse().unwrap());
        let class = |from: (&Place, Option<&Zone>), to: (&Place, Option<&Zone>), mode| {
            let site = |(place, zone)| Site { place, zone };
            // The compiler wants one lifetime for both sides.
            book.class(site(from), site(to), mode)
        };
        let here = (&virginia, Some(&a));
        assert_eq!(class(here, here, NetworkMode::PrivatePeering), PriceClass::SameZone);
        assert_eq!(class(here, (&virginia, Some(&b)), NetworkMode::Vpn), PriceClass::InterZone);
        assert_eq!(class(here, (&virginia, None), NetworkMode::Public), PriceClass::SameRegion);
        let unknown = (&virginia, None);
        assert_eq!(class(unknown, unknown, NetworkMode::Vpn), PriceClass::InterZone);
        assert_eq!(class(here, (&ohio, Some(&a)), NetworkMode::Vpn), PriceClass::InterRegion);
    }

    #[test]
    fn hosts_outside_the_project_are_the_internet() {
        let from = place("azure_brazilsouth");
        let rate = PriceBook::shipped().rate(PriceClass::Internet, &from, None).unwrap();
        assert_eq!(rate.per_gb, NanoUsd(181_000_000));
        assert_eq!(rate.bytes_per_gb.get(), 1 << 30);
    }

    #[test]
    fn an_amount_is_read_exactly_or_not_at_all() {
        assert_eq!(dollars("0.0012").unwrap(), NanoUsd(1_200_000));
        assert_eq!(dollars("3").unwrap(), NanoUsd(3_000_000_000));
        assert_eq!(dollars("0.000000001").unwrap(), NanoUsd(1));
        for bad in ["", ".5", "1.", "-1", "1e3", "0.0000000001", "null", "99999999999"] {
            assert!(dollars(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sums_are_rounded_once_and_halves_go_to_even() {
        let rate = |nanos, bytes| Rate {
            per_gb: NanoUsd(nanos),
            bytes_per_gb: NonZeroU64::new(bytes).unwrap(),
        };
        let gb = 1 << 30;
        assert_eq!(rate(90_000_000, gb).cost(ByteCount(10 * gb)), NanoUsd(900_000_000));
        assert_eq!(rate(1, 2).cost(ByteCount(1)), NanoUsd(0));
        assert_eq!(rate(1, 2).cost(ByteCount(3)), NanoUsd(2));
        assert_eq!(rate(1, 2).cost(ByteCount(5)), NanoUsd(2));
        assert_eq!(rate(i64::MAX, 1).cost(ByteCount(u64::MAX)), NanoUsd(i64::MAX));
    }

    #[test]
    fn a_broken_book_is_refused_with_its_reason() {
        assert!(matches!(PriceBook::parse("a: ["), Err(PriceError::Syntax(_))));
        assert!(matches!(PriceBook::parse("as_no: 1"), Err(PriceError::Missing { .. })));
        let text = "as_of: x\nproviders: {a: {bytes_per_gb: 1000, common: {internet: {tiers: [[null, 9c]]}}}}";
        assert!(
            matches!(PriceBook::parse(text), Err(PriceError::Amount { found }) if found == "9c")
        );
        assert!(PriceBook::parse(&text.replace("1000", "0")).is_err());
        assert!(PriceBook::parse(&text.replace("9c", "0.09")).is_ok());
    }

    proptest! {
        #[test]
        fn a_sum_costs_what_it_costs_within_half_a_nano(
            bytes in any::<u64>(), nanos in 0i64..1_000_000_000, gb in 1u64..(1 << 31),
        ) {
            let rate = Rate { per_gb: NanoUsd(nanos), bytes_per_gb: NonZeroU64::new(gb).unwrap() };
            let cost = rate.cost(ByteCount(bytes)).0;
            prop_assume!(cost < i64::MAX);
            let error = i128::from(bytes) * i128::from(nanos) - i128::from(cost) * i128::from(gb);
            prop_assert!(error.abs() * 2 <= i128::from(gb));
        }
    }
}
