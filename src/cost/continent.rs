//! Which continent a provider's region is on, as far as prices depend on it.

use crate::model::Place;

/// A continent in the sense of the providers' price lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Continent {
    NorthAmerica,
    SouthAmerica,
    Europe,
    Asia,
    China,
    Oceania,
    MiddleEast,
    Africa,
}

/// Prefixes of region names as AWS, Google Cloud and Oracle form them, and the places of Hetzner.
const PREFIXES: [(&str, Continent); 23] = [
    ("cn-", Continent::China),
    ("us-", Continent::NorthAmerica),
    ("ca-", Continent::NorthAmerica),
    ("mx-", Continent::NorthAmerica),
    ("northamerica-", Continent::NorthAmerica),
    ("sa-", Continent::SouthAmerica),
    ("southamerica-", Continent::SouthAmerica),
    ("eu-", Continent::Europe),
    ("uk-", Continent::Europe),
    ("europe-", Continent::Europe),
    ("ap-southeast-2", Continent::Oceania),
    ("ap-southeast-4", Continent::Oceania),
    ("ap-southeast-6", Continent::Oceania),
    ("australia-", Continent::Oceania),
    ("ap-", Continent::Asia),
    ("asia-", Continent::Asia),
    ("me-", Continent::MiddleEast),
    ("il-", Continent::MiddleEast),
    ("af-", Continent::Africa),
    ("africa-", Continent::Africa),
    ("fsn", Continent::Europe),
    ("nbg", Continent::Europe),
    ("hel", Continent::Europe),
];

/// Words within Azure's region names; the first that occurs decides (`austria` and `australia` before `us`, and
/// `brazilus`, which is in the United States, before `brazil`).
const WORDS: [(&str, Continent); 34] = [
    ("australia", Continent::Oceania),
    ("newzealand", Continent::Oceania),
    ("austria", Continent::Europe),
    ("europe", Continent::Europe),
    ("uk", Continent::Europe),
    ("france", Continent::Europe),
    ("germany", Continent::Europe),
    ("switzerland", Continent::Europe),
    ("norway", Continent::Europe),
    ("sweden", Continent::Europe),
    ("italy", Continent::Europe),
    ("spain", Continent::Europe),
    ("poland", Continent::Europe),
    ("denmark", Continent::Europe),
    ("belgium", Continent::Europe),
    ("china", Continent::China),
    ("asia", Continent::Asia),
    ("japan", Continent::Asia),
    ("korea", Continent::Asia),
    ("india", Continent::Asia),
    ("malaysia", Continent::Asia),
    ("indonesia", Continent::Asia),
    ("taiwan", Continent::Asia),
    ("brazilus", Continent::NorthAmerica),
    ("brazil", Continent::SouthAmerica),
    ("chile", Continent::SouthAmerica),
    ("southafrica", Continent::Africa),
    ("uae", Continent::MiddleEast),
    ("qatar", Continent::MiddleEast),
    ("israel", Continent::MiddleEast),
    ("canada", Continent::NorthAmerica),
    ("mexico", Continent::NorthAmerica),
    ("usgov", Continent::NorthAmerica),
    ("us", Continent::NorthAmerica),
];

impl Continent {
    /// Where `place` is; `None` for a region whose name does not tell.
    pub(super) fn of(place: &Place) -> Option<Self> {
        let region = place.region().as_str();
        let found = if place.provider().as_str() == "azure" {
            WORDS.iter().find(|(word, _)| region.contains(word))
        } else {
            PREFIXES.iter().find(|(prefix, _)| region.starts_with(prefix))
        };
        found.map(|(_, continent)| *continent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn region_names_tell_their_continent() {
        for (place, continent) in [
            ("aws/us-east-1", Continent::NorthAmerica),
            ("aws/ap-southeast-2", Continent::Oceania),
            ("aws/ap-southeast-1", Continent::Asia),
            ("azure/eastus2", Continent::NorthAmerica),
            ("azure/westus", Continent::NorthAmerica),
            ("azure/austriaeast", Continent::Europe),
            ("azure/australiaeast", Continent::Oceania),
            ("azure/jioindiawest", Continent::Asia),
            ("azure/uksouth", Continent::Europe),
            ("azure/taiwannorth", Continent::Asia),
            ("azure/brazilus", Continent::NorthAmerica),
            ("azure/brazilsouth", Continent::SouthAmerica),
            ("gcp/europe-west3", Continent::Europe),
            ("gcp/asia-northeast1", Continent::Asia),
        ] {
            assert_eq!(Continent::of(&place.parse().unwrap()), Some(continent), "{place}");
        }
        assert_eq!(Continent::of(&"vultr/ewr".parse().unwrap()), None);
    }

    #[test]
    fn every_region_that_the_shipped_price_book_names_has_a_continent() {
        let (mut provider, mut seen) = ("", 0);
        for line in include_str!("../../config/pricing.yaml").lines() {
            let name = line.strip_prefix("  ").and_then(|line| line.split_once(':'));
            if let Some((name, _)) = name.filter(|(name, _)| !name.starts_with([' ', '#'])) {
                provider = name;
            }
            let list = line.split_once("regions: [").and_then(|(_, rest)| rest.split_once(']'));
            let Some((list, _)) = list.filter(|_| !line.contains("_regions")) else { continue };
            for region in list.split(',').map(str::trim).filter(|region| !region.contains('*')) {
                let place = format!("{provider}/{region}").parse().unwrap();
                assert!(Continent::of(&place).is_some(), "{provider}/{region}");
                seen += 1;
            }
        }
        assert!(seen > 100, "{seen}");
    }
}
